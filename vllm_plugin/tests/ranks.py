"""Engines on two ranks, and what they answer: run by `conftest.on_ranks`, by itself a script.

    python ranks.py '[[SETTINGS, WANTED], …]'

Prints `ANSWERS [[rows], …]`. Started once by itself it has vLLM start its processes; started once a
rank, with RANK and so on set, each of them is a rank of all engines.
"""

import gc
import json
import os
import sys

if __name__ == "__main__":
    import vllm
    from conftest import generate

    answers = []
    for settings, wanted in json.loads(sys.argv[1]):
        llm = vllm.LLM(**settings)
        answers.append(generate(llm, wanted))
        del llm
        gc.collect()
    if os.environ.get("RANK", "0") == "0":
        print("ANSWERS", json.dumps(answers))
