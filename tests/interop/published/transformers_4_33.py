"""Run by a Python that has transformers 4.33, the one that the published weights were trained and saved with.

save TOKENIZER.MODEL DIRECTORY   grow the tokenizer as the published scripts do, and save it
encode DIRECTORY                 JSON list of texts on standard input -> list of ids on standard output
"""

import json
import sys

from transformers import LlamaTokenizer

MARKERS = ["<sosp>", "<eosp>", "[Human]", "[SpeechGPT]", "<eoh>", "<eos>"]


def save(model: str, directory: str) -> None:
    tokenizer = LlamaTokenizer(model)
    tokenizer.pad_token_id = 0
    tokenizer.padding_side = "left"
    tokenizer.add_tokens([f"<{unit}>" for unit in range(1000)] + MARKERS[:2])
    tokenizer.save_pretrained(f"{directory}-ma")
    for marker in MARKERS:
        if marker not in tokenizer.get_vocab():
            tokenizer.add_tokens([marker])
    tokenizer.save_pretrained(f"{directory}-cm")


def encode(directory: str) -> None:
    tokenizer = LlamaTokenizer.from_pretrained(directory)
    json.dump([tokenizer.encode(text) for text in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    {"save": save, "encode": encode}[sys.argv[1]](*sys.argv[2:])
