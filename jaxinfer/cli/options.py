"""The options that commands share: which model, and how tokens are drawn."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxinfer.errors import InputError

_SAMPLING = {
    "temperature": (float, "randomness; 0 takes the most likely token"),
    "top_k": (int, "draw from the K most likely tokens; 0 is off"),
    "top_p": (float, "draw from the most likely tokens of this total probability; 1 is off"),
    "min_p": (float, "drop tokens less likely than this times the most likely; 0 is off"),
    "repetition_penalty": (float, "above 1 makes tokens that occurred already less likely"),
}


@dataclasses.dataclass(frozen=True)
class Generating:
    """How to generate: the `generate` part of a config, after flags."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    stop: tuple[str, ...]

    def sampling(self):
        """Return the options as `Sampling`. Raises InputError where one is out of its range."""
        from jaxinfer.decode.sampling import Sampling

        return Sampling.of(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add --model, --config, --dtype, --keep-quantized, --pass and --calibrate."""
    parser.add_argument("--model", metavar="M", help="name, path or hub repository (default: smollm2-135m)")
    parser.add_argument("--config", metavar="FILE", help="Python file with get_config(), or FILE:ARGUMENT")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: what this device runs fastest)")
    parser.add_argument(
        "--keep-quantized", action="store_true", help="leave a GGUF file's 8- and 4-bit weights as they are"
    )
    add_passes(parser)


def add_distributed(parser: argparse.ArgumentParser) -> None:
    """Add --distributed."""
    parser.add_argument(
        "--distributed", metavar="D",
        help="be one of several processes: ADDRESS:PORT,COUNT,INDEX, or auto on a cluster that JAX knows",
    )  # fmt: skip


def join(args: argparse.Namespace) -> None:
    """Join the processes of --distributed, if it is given. Raises InputError where there is no mesh over them."""
    if args.distributed is not None:
        if args.mesh is None and args.config is None:
            raise InputError(f"--distributed {args.distributed}: needs the mesh over all devices; give --mesh too")
        from jaxinfer.sharding import processes

        processes.join(args.distributed)


def shared(path: str) -> str:
    """Return a path to write to: in all processes but the first that of a copy."""
    from jaxinfer.sharding import processes

    return str(processes.same_file(path))


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Add --mesh and --rules."""
    parser.add_argument(
        "--mesh", metavar="M", help="run on a mesh of devices, such as data=2,model=4; a CPU simulates them"
    )
    parser.add_argument("--rules", metavar="NAME", help="what each axis of the mesh divides (default: mixed)")


def add_passes(parser: argparse.ArgumentParser) -> None:
    """Add --pass and --calibrate."""
    parser.add_argument(
        "--pass", dest="passes", action="append", metavar="P",
        help="apply a pass: NAME or NAME:OPTION=VALUE,...; repeat to stack (see jaxinfer passes)",
    )  # fmt: skip
    parser.add_argument("--calibrate", metavar="FILE", help="text for the passes that calibrate on one")


def add_generating(parser: argparse.ArgumentParser) -> None:
    """Add --max-new-tokens, the sampling options, --seed and --stop."""
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="stop after N tokens")
    for name, (kind, what) in _SAMPLING.items():
        parser.add_argument(_flag(name), type=kind, metavar="X" if kind is float else "K", help=what)
    add_drafter(parser)
    parser.add_argument("--seed", type=int, metavar="N", help="same seed, same text")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")


def add_drafter(parser: argparse.ArgumentParser) -> None:
    """Add --drafter and --verifier."""
    parser.add_argument(
        "--drafter", metavar="D",
        help="speculate: ngram, lookahead, exit:layers=N, datastore:file=F, self:passes=P+P or model:name=M; options "
        "follow as NAME:OPTION=VALUE,...",
    )  # fmt: skip
    parser.add_argument("--verifier", help="of sampled drafts: coupled (default), block, rejection, or typical (lossy)")


def take_positional(args: argparse.Namespace) -> None:
    """Let MODEL stand for --model. Raises InputError where both are given."""
    if args.name is not None:
        if args.model is not None:
            raise InputError(f"--model {args.model}: MODEL is given already, {args.name!r}; give one of them")
        args.model = args.name


def read_config(args: argparse.Namespace):
    """Return the config: the defaults, then --config, then the flags of `add_model`."""
    from jaxinfer import configuration

    config = configuration.read_config(args.config) if args.config else configuration.defaults()
    if args.model is not None:
        config.model, config.architecture = args.model, {}
    if args.dtype is not None:
        config.dtype = args.dtype
    if args.keep_quantized:
        config.keep_quantized = True
    for name in ("mesh", "rules"):
        if getattr(args, name, None) is not None:
            config[name] = getattr(args, name)
    if getattr(args, "rules", None) is not None and not config.mesh:
        raise InputError(f"--rules {args.rules}: says what a mesh divides; give --mesh too, such as data=2,model=4")
    if getattr(args, "passes", None):
        config.passes = tuple(args.passes)
    for name in ("drafter", "verifier"):
        if getattr(args, name, None) is not None:
            config[name] = getattr(args, name)
    if getattr(args, "calibrate", None) is not None:
        config.calibration.text = args.calibrate
    return configuration.check(config)


def load(config, progress: bool = False):
    """Return the program of `config`, with a progress bar where one is wanted."""
    from jaxinfer import configuration

    return configuration.from_config(config, progress=progress)


def random_weights(args: argparse.Namespace, tokens: int):
    """Return a program of a published shape, or of a model by its name, with random weights for `tokens` tokens.

    In bfloat16 unless told, on a CPU in float32.

    Raises:
        InputError: options that ask for more than an architecture.
    """
    for name in ("config", "calibrate"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name}: --random-weights takes an architecture by MODEL alone; leave it out")
    import jax

    from jaxinfer import loading
    from jaxinfer.eval.bench import random_program
    from jaxinfer.plan.shapes import find_shape

    loading.enable_compilation_cache()
    config, _ = find_shape(args.model or "smollm2-135m")
    # Random weights know no context: let the positions go on as far as they are asked for.
    config = dataclasses.replace(config, max_context=max(config.max_context, tokens))
    return random_program(config, args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))


def generating(args: argparse.Namespace, config, recommended: Mapping[str, Any] | None = None) -> Generating:
    """Return the options of `add_generating`: flags win over --config, which wins over `recommended`."""
    options = config.generate.to_dict()
    if not args.config:
        options |= recommended or {}
    for name in options:
        given = getattr(args, name, None)
        if given is not None:
            options[name] = given
    result = Generating(**{**options, "stop": tuple(options["stop"])})
    if result.max_new_tokens < 1:
        raise InputError(f"max_new_tokens={result.max_new_tokens}: must be 1 or more")
    if not all(result.stop):
        raise InputError("stop='': must be text that is not empty")
    return result


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
