"""A program that speculates: the same output, by fewer passes of the model where drafts are good."""

from jaxinfer.decode.draft import Drafter
from jaxinfer.decode.drafters.model import DraftModel
from jaxinfer.decode.drafters.ngram import NGram
from jaxinfer.decode.speculative import Speculative
from jaxinfer.errors import InputError, nearest
from jaxinfer.program import Program

DRAFTERS = {"ngram": NGram}  # those that need no model


def speculative(
    program: Program,
    draft: Program | Drafter | str = "ngram",
    *,
    length: int | None = None,
    verifier: str = "block",
) -> Program:
    """Return the program with drafts: of a program (another, or this one under passes), or of a drafter by name.

    `length` is how many tokens are drafted for each pass of the program's own model. Greedy output is the program's,
    token by token; sampled output has its law, by `verifier`: "block" keeps at least as many tokens as "rejection".

    Raises:
        InputError: the draft has another vocabulary, or no drafter has that name.
    """
    if verifier not in ("block", "rejection"):
        raise InputError(f"verifier={verifier!r}: {nearest(verifier, ('block', 'rejection'))}")
    options = {} if length is None else {"length": length}
    if isinstance(draft, str):
        if draft not in DRAFTERS:
            raise InputError(f"no drafter {draft!r}: {nearest(draft, DRAFTERS)}")
        draft = DRAFTERS[draft](**options)
    elif isinstance(draft, Program):
        _check_vocabulary(program, draft)
        draft = DraftModel(draft.model, **options)
    elif options:
        raise InputError(f"length={length}: the drafter has its own; give it there")
    return program.replace(decoder=Speculative(draft, verifier=verifier))


def _check_vocabulary(program: Program, draft: Program) -> None:
    ours, theirs = program.config.vocab_size, draft.config.vocab_size
    if ours != theirs:
        raise InputError(f"the draft has {theirs} tokens and the target {ours}: a draft must have the same vocabulary")
    if program.tokenizer is None or draft.tokenizer is None:
        return
    for i in range(ours):
        one, other = (p.tokenizer.decode([i], skip_special=False) for p in (program, draft))
        if one != other:
            raise InputError(
                f"token {i} is {one!r} in the target and {other!r} in the draft: a draft must have the same vocabulary"
            )
