"""A program that speculates: the same output, by fewer passes of the model where drafts are good.

    speculative(program, "ngram")                            # what followed these tokens earlier in the text
    speculative(program, "self:passes=int4+kv_int8,length=5")  # the program itself under passes
    speculative(program, "exit:layers=10")                   # its own first layers, with their work shared
    speculative(program, "datastore:file=code.txt")          # what follows in a corpus
    speculative(program, other)                              # any program with the same vocabulary

A new drafter is a file with a `Drafter` and a line in `DRAFTERS`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxinfer.decode.draft import Drafter
from jaxinfer.decode.drafters.datastore import Datastore
from jaxinfer.decode.drafters.exit import Exit
from jaxinfer.decode.drafters.lookahead import Lookahead
from jaxinfer.decode.drafters.model import DraftModel
from jaxinfer.decode.drafters.ngram import NGram
from jaxinfer.decode.speculative import Speculative
from jaxinfer.errors import InputError, nearest
from jaxinfer.passes import apply, options_of, typed
from jaxinfer.program import Program

VERIFIERS = ("coupled", "block", "rejection", "typical")


def speculative(
    program: Program,
    draft: Program | Drafter | str = "ngram",
    *,
    length: int | None = None,
    verifier: str = "coupled",
    adapt: bool = True,
) -> Program:
    """Return the program with drafts: of a program (another, or this one under passes), or of a drafter by name.

    `length` is how many tokens are drafted for each pass of the program's own model. Greedy output is the program's,
    token by token. Sampled output has its law: by "coupled" it is even the program's own, token by token for the same
    seed; "block" and "rejection" draw drafts by chance and keep more of them, "block" the most. "typical" is lossy: it
    keeps what is likely enough. With `adapt` each step drafts as much as is worth it, none where it loses, by what was
    kept before and by what checks cost here, which is measured once; the width then decides which draws "block" and
    "rejection" make.

    Raises:
        InputError: the draft has another vocabulary, no drafter has that name, or an option is out of its range.
    """
    if verifier not in VERIFIERS:
        raise InputError(f"verifier={verifier!r}: {nearest(verifier, VERIFIERS)}")
    options = {} if length is None else {"length": length}
    if isinstance(draft, str):
        draft = drafter(program, draft, **options)
    elif isinstance(draft, Program):
        draft = _model(program, draft, **options)
    elif options:
        raise InputError(f"length={length}: the drafter has its own; give it there")
    return program.replace(decoder=Speculative(draft, verifier=verifier, adapt=adapt))


def drafter(program: Program, spec: str, **more: Any) -> Drafter:
    """Return the drafter for `program` that "name" or "name:option=value,option=value" means.

    Raises:
        InputError: an unknown name or option (the nearest are named), or a value out of its range.
    """
    make, options = _parsed(spec, more)
    return make(program, **options)


def check_drafter(spec: str) -> None:
    """Raise InputError where a drafter's name or options are wrong, before anything is loaded."""
    _parsed(spec, {})


def _parsed(spec: str, more: Mapping[str, Any]) -> tuple[Callable[..., Drafter], dict[str, Any]]:
    name, _, rest = spec.partition(":")
    if name not in DRAFTERS:
        raise InputError(f"no drafter {name!r}: {nearest(name, DRAFTERS)}")
    make, kinds = DRAFTERS[name]
    given = {**(options_of(spec, rest) if rest else {}), **more}
    for key in given:
        if key not in kinds:
            raise InputError(f"{name} has no option {key!r}: {nearest(key, kinds)}")
    return make, {key: typed(f"{name}:{key}", value, kinds[key]) for key, value in given.items()}


def _model(program: Program, draft: Program, **options: Any) -> DraftModel:
    _check_vocabulary(program, draft)
    return DraftModel(draft.model, **options)


def _load(program: Program, name: str = "", **options: Any) -> DraftModel:
    from jaxinfer.loading import load

    if not name:
        raise InputError("model: needs name=MODEL, the program that drafts")
    return _model(program, load(name), **options)


def _itself(program: Program, passes: str = "", **options: Any) -> DraftModel:
    if not passes:
        raise InputError("self: needs passes=NAME+NAME..., those that make the draft of the program itself")
    return _model(program, apply(program, *passes.split("+")), **options)


def _exit(program: Program, layers: int = 0, **options: Any) -> Exit:
    if not layers:
        raise InputError(f"exit: needs layers=N, below the model's {program.config.num_layers}")
    return Exit(layers=layers, **options)


def _datastore(program: Program, file: str = "", **options: Any) -> Datastore:
    from jaxinfer.eval.data import read_text

    if not file:
        raise InputError("datastore: needs file=FILE, a text to find continuations in")
    if program.tokenizer is None:
        raise InputError("datastore: the program has no tokenizer; make one with Datastore.of(tokens)")
    return Datastore.of(program.tokenizer.encode(read_text(file)), **options)


def _options(kind: type, **more: type) -> Mapping[str, Any]:
    plain = {f.name: f.type for f in dataclasses.fields(kind) if f.type in (int, float, bool, str)}
    return {**plain, **more}


# By name: how one is made for a program, and the types of its options.
DRAFTERS: dict[str, tuple[Callable[..., Drafter], Mapping[str, Any]]] = {
    "ngram": (lambda _, **options: NGram(**options), _options(NGram)),
    "lookahead": (lambda _, **options: Lookahead(**options), _options(Lookahead)),
    "exit": (_exit, _options(Exit)),
    "datastore": (_datastore, _options(Datastore, file=str)),
    "self": (_itself, _options(DraftModel, passes=str)),
    "model": (_load, _options(DraftModel, name=str)),
}


def _check_vocabulary(program: Program, draft: Program) -> None:
    ours, theirs = program.config.vocab_size, draft.config.vocab_size
    if ours != theirs:
        raise InputError(f"the draft has {theirs} tokens and the target {ours}: a draft must have the same vocabulary")
    if program.tokenizer is None or draft.tokenizer is None or program.tokenizer is draft.tokenizer:
        return
    for i in range(ours):
        one, other = (p.tokenizer.decode([i], skip_special=False) for p in (program, draft))
        if one != other:
            raise InputError(
                f"token {i} is {one!r} in the target and {other!r} in the draft: a draft must have the same vocabulary"
            )
