"""Write tests/goldens/tokenizers.json.xz: what transformers and llama.cpp make of the strings in tests/text_strings.py.

Run it with the packages of the `peers` extra:

    python scripts/make_tokenizer_goldens.py SMOLLM2.gguf STORIES260K_DIR

One object: `smollm2` and `stories260K` are transformers' (`ids` of each string, `chat` of each conversation without and
with the prompt for an answer), `stories260K_gguf` llama.cpp's ids for the same vocabulary as tests/gguf_files.py writes
it, and `smollm2_llama_cpp` llama.cpp's for the first file, which cuts texts in its own way.
"""

import argparse
import json
import lzma
import sys
import tempfile
from pathlib import Path

import llama_cpp
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from gguf_files import spm_keys, write_gguf  # noqa: E402
from text_strings import CONVERSATIONS, STRINGS  # noqa: E402


def from_transformers(tokenizer: transformers.PreTrainedTokenizerBase) -> dict:
    """Return the ids of all strings and, where there is a template, the text of all conversations."""
    out: dict = {"ids": [tokenizer.encode(text) for text in STRINGS]}
    if tokenizer.chat_template:
        out["chat"] = [
            [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=p) for p in (False, True)]
            for c in CONVERSATIONS
        ]
    return out


def from_llama_cpp(path: Path) -> list[list[int]]:
    """Return llama.cpp's ids of all strings, with the tokens that the file says to add."""
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    add_bos = bool(llama_cpp.llama_vocab_get_add_bos(model._model.vocab))
    return [model.tokenize(text.encode(), add_bos=add_bos, special=True) for text in STRINGS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("smollm2", type=Path, help="SmolLM2's GGUF file")
    parser.add_argument("stories", type=Path, help="directory of stories260K")
    args = parser.parse_args()
    auto = transformers.AutoTokenizer.from_pretrained
    with tempfile.TemporaryDirectory() as directory:
        rebuilt = write_gguf(Path(directory) / "spm.gguf", keys=spm_keys(args.stories / "tokenizer.json"))
        goldens = {
            "versions": {"transformers": transformers.__version__, "llama_cpp": llama_cpp.__version__},
            "smollm2": from_transformers(auto(args.smollm2.parent, gguf_file=args.smollm2.name)),
            "smollm2_llama_cpp": from_llama_cpp(args.smollm2),
            "stories260K": from_transformers(auto(args.stories)),
            "stories260K_gguf": from_llama_cpp(rebuilt),
        }
    target = ROOT / "tests" / "goldens" / "tokenizers.json.xz"
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(lzma.compress(json.dumps(goldens).encode(), preset=9))
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
