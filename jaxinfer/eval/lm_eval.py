"""Any program as a model of EleutherAI's lm-evaluation-harness, under the name "jaxinfer".

    python -m jaxinfer.eval.lm_eval --model jaxinfer --model_args pretrained=smollm2-135m,passes=int8+kv_int8 \\
        --tasks hellaswag --limit 100 --batch_size 8

The arguments are those of `lm-eval run`. In Python: `lm_eval.simple_evaluate(JaxinferLM(program), tasks=[...])`.
The harness is an optional extra, `pip install jaxinfer[lm-eval]`; PyTorch is not needed.
"""

import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from jaxinfer import loading
from jaxinfer.decode.sampling import Sampling
from jaxinfer.errors import InputError
from jaxinfer.eval.scoring import Pair, score_each
from jaxinfer.eval.tasks import encode_pair
from jaxinfer.generation import decode_text, tokenizer_of
from jaxinfer.passes import apply
from jaxinfer.program import Program
from jaxinfer.session import Session

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:  # the extra is not installed: everything here can be imported, and nothing can be made
    LM, register_model = None, lambda name: lambda kind: kind

_STEPS = 16  # tokens a row decodes before its text is searched for the strings that end it
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one option, by precedence
_SAMPLING = {"top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float}
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1}  # options that tasks spell out at the only value we have


@register_model("jaxinfer")
class JaxinferLM(LM or object):
    """Answers the harness's three kinds of request with a program, passes and all.

    `program` is a `Program`, or `pretrained` names one for `ji.load` (with `dtype` and `keep_quantized`). `passes` are
    applied to it: specs as on the command line, in a list, or in one string with `+` between passes and `;` between
    options (`"int4:group=64;symmetric=false+kv_int8"`). Row i of a request list draws with seed `seed + i`.
    `device` is what the harness fills in ("cuda:0") and has no meaning here: JAX decides, by $JAX_PLATFORMS.

    Raises:
        InputError: the harness is not installed, no model or two of them, an argument that does not exist.
    """

    def __init__(
        self,
        program: Program | None = None,
        *,
        pretrained: str | None = None,
        passes: str | Sequence[str] = (),
        dtype: str | None = None,
        keep_quantized: bool = False,
        batch_size: int | str = 8,
        max_gen_toks: int = 256,
        seed: int = 0,
        device: str | None = None,
        **unknown: Any,
    ):
        _require()
        super().__init__()
        if unknown:
            raise InputError(
                f"model argument {', '.join(map(repr, unknown))}: does not exist; there are pretrained, passes, dtype, "
                "keep_quantized, batch_size, max_gen_toks and seed"
            )
        if (program is None) == (pretrained is None):
            raise InputError(f"pretrained={pretrained!r}: give one model, as pretrained=NAME or as a program")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"batch_size={batch_size!r}: must be a whole number, 1 or more")
        if program is None:
            program = loading.load(pretrained, dtype=dtype, keep_quantized=keep_quantized)
        self.program = _with_passes(program, passes)
        self.batch_size, self.max_gen_toks, self.seed = int(batch_size), int(max_gen_toks), int(seed)
        self._tokens = tokenizer_of(self.program)  # the harness takes an attribute `tokenizer` for a transformers one

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches requests that went through a chat template."""
        return (self.program.name or "jaxinfer").replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes into its results about the model."""
        return {
            "jaxinfer_model": self.program.name,
            "jaxinfer_passes": [[name, dict(options)] for name, options in self.program.passes],
        }

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the template that `apply_chat_template` uses, or nothing where none is asked for."""
        return (self._tokens.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the messages as the model was trained on them; without a prompt the last one stays open."""
        text = self._tokens.apply_chat(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability after its context, and whether greedy decoding would say it."""
        pairs = [self._pair(*request.args) for request in requests]
        out: list[Any] = [None] * len(requests)
        for i, score in score_each(self.program, pairs, self.batch_size, not disable_tqdm) if pairs else ():
            out[i] = tuple(score)
            self.cache_hook.add_partial("loglikelihood", requests[i].args, out[i])
        return out

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return each text's log-probability; one longer than the context is cut into windows of that length."""
        windows = [self._windows(*request.args) for request in requests]
        owner = [i for i, pairs in enumerate(windows) for _ in pairs]
        pairs = [pair for pairs in windows for pair in pairs]
        out, left = [0.0] * len(requests), [len(pairs) for pairs in windows]
        for k, score in score_each(self.program, pairs, self.batch_size, not disable_tqdm) if pairs else ():
            i = owner[k]
            out[i] += score.logprob
            left[i] -= 1
            if not left[i]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, out[i])
        return out

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return each prompt's continuation, cut before the first of the strings that its options name."""
        out: list[Any] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        with tqdm(total=len(requests), unit="row", disable=disable_tqdm) as bar:
            for same in groups.values():
                for i, text in self._generate(same, [requests[i].args[0] for i in same], requests[same[0]].args[1]):
                    out[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update()
        return out

    def _generate(self, numbers: list[int], prompts: list[str], options: dict[str, Any]) -> Iterator[tuple[int, str]]:
        length, stop, sampling = _generating(options, self.max_gen_toks)
        room = self.program.config.max_context - length
        if room < 1 or length < 1:
            raise InputError(f"max_gen_toks={length}: must be 1 or more and leave room for a prompt in {room + length}")
        rows = {i: self._encode(prompt)[-room:] or [self._prefix()] for i, prompt in zip(numbers, prompts, strict=True)}
        ids = [self._tokens.backend.token_to_id(text) for text in stop]
        # A special token has no text to be found by.
        special = tuple(i for i in ids if i is not None and not self._tokens.decode([i]))
        program = self.program.replace(stop_ids=(*self.program.stop_ids, *special))
        order, size = sorted(rows, key=lambda i: -len(rows[i])), min(self.batch_size, len(rows))
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            padding = [[] for _ in range(size - len(chosen))]  # one shape for the last batch too
            session = Session(program, size)
            session.feed([rows[i] for i in chosen] + padding, room=length)
            seeds = [self.seed + i for i in chosen] + [0] * len(padding)
            texts = [""] * size
            pieces = decode_text(session, length, sampling=sampling, seed=seeds, stop=stop, steps=lambda _: _STEPS)
            for more in pieces:
                texts = [text + piece for text, piece in zip(texts, more, strict=True)]
            yield from zip(chosen, texts, strict=False)

    def _encode(self, text: str) -> list[int]:
        ids = self._tokens.encode(text)
        twice = len(ids) > 1 and ids[0] == ids[1] == self._tokens.bos_id
        return ids[1:] if twice else ids  # a chat template writes the beginning token itself

    def _pair(self, context: str, continuation: str) -> Pair:
        if not context:
            ids = self._tokens.encode(continuation, add_special=False)
            prefix = self._prefix()
            return (ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids)
        before, after = encode_pair(self._tokens, context, continuation)
        twice = len(before) > 1 and before[0] == before[1] == self._tokens.bos_id
        return before[1:] if twice else before, after

    def _windows(self, text: str) -> list[Pair]:
        ids = self._tokens.encode(text, add_special=False)
        limit = self.program.config.max_context
        windows: Iterable[Any] = get_rolling_token_windows(ids, self._prefix(), limit, context_len=1)
        return [make_disjoint_window(window) for window in windows]

    def _prefix(self) -> int:
        """Return the token that stands before a text's first one, so that it can be scored."""
        for token in (self._tokens.bos_id, self._tokens.eos_id, *self.program.stop_ids):
            if token is not None:
                return token
        raise InputError("a request without context: this tokenizer has no beginning or end token to put before it")


def _require() -> None:
    if LM is None:
        raise InputError("the package lm_eval is missing: pip install 'jaxinfer[lm-eval]'")


def _with_passes(program: Program, passes: str | Sequence[str]) -> Program:
    if isinstance(passes, str):
        passes = [spec.replace(";", ",") for spec in passes.split("+") if spec]
    return apply(program, *passes)


def _generating(options: dict[str, Any], max_gen_toks: int) -> tuple[int, list[str], Sampling]:
    """Return the number of tokens, the strings to stop at and the sampling that a request's options ask for."""
    options = {key: value for key, value in options.items() if value is not None and _NEUTRAL.get(key) != value}
    lengths = [options.pop(key) for key in _LENGTHS if key in options]
    until = options.pop("until", [])
    until = [until] if isinstance(until, str) else until
    temperature = float(options.pop("temperature", 0.0))
    greedy = not options.pop("do_sample", temperature > 0)
    sampling = {key: kind(options.pop(key)) for key, kind in _SAMPLING.items() if key in options}
    if options:
        warnings.warn(f"generation options {', '.join(options)} have no counterpart and are ignored", stacklevel=2)
    length = int(lengths[0]) if lengths else max_gen_toks
    return length, [text for text in until if text], Sampling.of(0.0 if greedy else temperature, **sampling)


def main() -> int:
    """Run `lm-eval` with the model "jaxinfer" known to it; a user's mistake is one line."""
    try:
        _require()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
