"""vLLM behind a pipe: its own interpreter runs this file, which therefore imports nothing of ours.

argv[1] {"model", "dtype", "max_model_len"} ──► {"version"} once it is ready
a line {"prompts", "num_tokens"} on stdin ──► a line {"seconds", "token_ids"} on stdout, until stdin ends
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    import vllm

    settings = json.loads(sys.argv[1])
    llm = vllm.LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        max_model_len=settings["max_model_len"],
        enforce_eager=True,
        seed=0,
    )

    def answer(content: dict[str, object]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    answer({"version": vllm.__version__})
    for line in sys.stdin:
        request = json.loads(line)
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=request["num_tokens"], ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        answer({"seconds": seconds, "token_ids": [list(output.outputs[0].token_ids) for output in outputs]})


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
