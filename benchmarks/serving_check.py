# SPDX-License-Identifier: Apache-2.0
"""Does llama.cpp, given a folder in Jina's layout, return our embeddings?

Writes the folder with convert_weights.py, has llama.cpp's own converter make a float32 GGUF of it,
and compares mean embeddings of the first lines of a text file, one document a line:

    pip install llama-cpp-python gguf sentencepiece
    pip download llama-cpp-python --no-binary :all: --no-deps    # holds vendor/llama.cpp
    python benchmarks/serving_check.py --converter llama.cpp/convert_hf_to_gguf.py --text FILE \\
        --tokenizer bert-base-uncased                            # MosaicBERT-Base, random weights
    python benchmarks/serving_check.py --converter llama.cpp/convert_hf_to_gguf.py --text FILE \\
        --model FOLDER                                           # a converted one

llama.cpp knows tokenizers by a hash of what they do, and refuses those it has not seen. Prints a
line for each document and ends with one of JSON; fails where a cosine is below 0.9999.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

HERE = Path(__file__).resolve().parents[1]
LEAST = 0.9999


def write_random_model(folder: Path):
    """MosaicBERT-Base with weights large enough, and biases, that all of them matter."""
    config = AutoConfig.from_pretrained(HERE, trust_remote_code=True, initializer_range=0.04)
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config, trust_remote_code=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)


def our_embeddings(folder: Path, texts: list[str]) -> tuple[torch.Tensor, list[int]]:
    """(texts, dim): the mean over all tokens of each text; and the number of tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, add_pooling_layer=False)
    rows = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    with torch.no_grad():
        means = [model.eval()(row).last_hidden_state[0].mean(0) for row in rows]
    return torch.stack(means), [row.shape[1] for row in rows]


def llama_embeddings(gguf: Path, texts: list[str], longest: int) -> torch.Tensor:
    """(texts, dim), by llama.cpp on the CPU."""
    import llama_cpp

    # llama.cpp rounds the context up, and aborts where the batch is not as long.
    longest = -(-longest // 256) * 256
    sizes = {"n_ctx": longest, "n_batch": longest, "n_ubatch": longest}
    # It takes the mean because 1_Pooling/config.json told its converter so.
    llama = llama_cpp.Llama(str(gguf), embedding=True, verbose=False, **sizes)
    embeddings = torch.tensor([llama.embed(text) for text in texts])
    llama.close()
    return embeddings


def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--converter", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--model", type=Path, help="a converted folder; random weights if not given"
    )
    parser.add_argument("--tokenizer", help="for random weights: Hub id, folder or vocab.txt")
    parser.add_argument("--documents", type=int, default=8)
    args = parser.parse_args()
    for file in (args.converter, args.text):
        if not file.is_file():
            parser.error(f"there is no {file}: --help says where it comes from")
    if not args.model and not args.tokenizer:
        parser.error("random weights need --tokenizer, such as bert-base-uncased; or give --model")
    texts = args.text.read_text(encoding="utf-8").splitlines()[: args.documents]

    with tempfile.TemporaryDirectory() as temporary:
        ours, served, gguf = (Path(temporary, name) for name in ("ours", "served", "model.gguf"))
        source, tokenizer = args.model, ["--tokenizer", args.tokenizer] if args.tokenizer else []
        if source is None:
            source = Path(temporary, "random")
            write_random_model(source)
        run(HERE / "convert_weights.py", source, ours, *tokenizer)
        run(HERE / "convert_weights.py", source, served, *tokenizer, "--layout", "jina")
        run(args.converter, served, "--outtype", "f32", "--outfile", gguf)
        expected, lengths = our_embeddings(ours, texts)
        served_by_llama = llama_embeddings(gguf, texts, max(lengths))

    cosines = cosine_similarity(expected.double(), served_by_llama.double()).tolist()
    others = normalize(expected, dim=1) @ normalize(expected, dim=1).T
    closest = others.fill_diagonal_(-1).amax(1).tolist()
    print("tokens  llama.cpp's and ours  ours and the closest other document's")
    for length, cosine, other in zip(lengths, cosines, closest, strict=True):
        print(f"{length:6}  {cosine:20.8f}  {other:.4f}")
    print(json.dumps({"lowest_cosine": min(cosines), "tokens": lengths, "least": LEAST}))
    if not min(cosines) >= LEAST:
        raise SystemExit(f"{min(cosines)} is below {LEAST}")


if __name__ == "__main__":
    main()
