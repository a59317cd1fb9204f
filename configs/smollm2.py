"""SmolLM2-135M-Instruct: the smallest model here that speaks.

Purpose: generate and chat with a real pretrained model on any machine.
Command: jaxinfer generate "What is the capital of France?" --chat --config configs/smollm2.py
         (configs/smollm2.py:sampled draws with the settings that its authors recommend)
Expect:  134,515,008 parameters, 46,080 bytes of KV cache a token in float32 (23,040 in bfloat16), context 8192.
"""

from ml_collections import ConfigDict

from jaxinfer.configuration import defaults


def get_config(argument: str | None = None) -> ConfigDict:
    """Return the config: greedy, or `sampled`."""
    if argument not in (None, "sampled"):
        raise ValueError(f"argument {argument!r}: must be 'sampled', or left out")
    config = defaults()
    config.model = "smollm2-135m"
    config.generate.max_new_tokens = 256
    if argument == "sampled":
        config.generate.temperature = 0.2
        config.generate.top_p = 0.9
    return config
