"""The ready-made rules: which mesh axes each logical axis of weights, caches and activations is divided over.

Logical axes: embed, mlp, heads, kv_heads, head_dim, vocab, experts (weights); batch, kv_heads, sequence (caches, of
which sequence is the slots; new tokens are batch by sequence where they are many); layers, of both.
A mixture is a mesh with several axes: under "mixed" each strategy is a mesh axis of its own.
"""

from jaxinfer.ops.placement import Rules

__all__ = ["DEFAULT", "MUST_DIVIDE", "RULES", "Rules"]

# Where the mesh does not divide the size of another axis, arrays lie whole along it: rows of a batch that are too few,
# a vocabulary of an odd size, a scale that one tile has. Of these the whole gain would be lost in silence.
MUST_DIVIDE = ("heads", "kv_heads", "mlp", "experts", "layers")


def _rules(name: str, about: str, **table: tuple[str, ...]) -> Rules:
    return Rules(name, (*table.items(), ("sequence", ("context",)), ("layers", ("stage",))), about)


_WIDTHS = ("heads", "kv_heads", "mlp", "vocab")


def _widths(*axes: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(_WIDTHS, axes)


DEFAULT = "mixed"
RULES: dict[str, Rules] = {
    rules.name: rules
    for rules in (
        _rules(
            "mixed",
            "each strategy on the mesh axis of its name: any mixture is a mesh",
            batch=("data", "fsdp"),
            embed=("fsdp",),
            experts=("expert",),
            **_widths("model", "expert"),
        ),
        _rules(
            "tensor",
            "heads, the mlp's width, the vocabulary and experts over model; rows over data",
            batch=("data",),
            experts=("model",),
            **_widths("model"),
        ),
        _rules(
            "fully_sharded",
            "rows over all axes but context and stage, and weights along embed over them, too: none holds a whole one",
            batch=("data", "fsdp", "model"),
            embed=("data", "fsdp", "model"),
        ),
        _rules(
            "data",
            "rows over all axes but context and stage; each device of a stage holds all of it",
            batch=("data", "model"),
        ),
        _rules(
            "expert",
            "experts, and heads and vocabulary, over expert and model; rows over data",
            batch=("data",),
            experts=("expert", "model"),
            **_widths("expert", "model"),
        ),
    )
}
