"""The first command: a model answers, then the schedules are compared."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import numpy as np

from nanoflow.bench.datasets import Request, random_lengths, random_requests
from nanoflow.bench.throughput import Measurement, measure
from nanoflow.llm import LLM
from nanoflow.sampling_params import SamplingParams
from nanoflow.schedule import BUILT_IN

QUESTIONS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a haiku about the sea.",
)
ANSWER_TOKENS = 96
NUM_REQUESTS, INPUT_LEN, OUTPUT_LEN = 64, 128, 64
NUM_WARM_UPS = 8
DESCRIPTIONS = {
    "sequential": "one operation after the other",
    "nano": "the batch in two nano-batches, nothing overlaps",
    "overlap": "stages of one nano-batch beside those of the other",
}


def first_run(model: str | Path) -> None:
    """Prints three answers and the throughput of every built-in schedule."""
    begin = perf_counter()
    for number, schedule in enumerate(BUILT_IN):
        with LLM(model, schedule=schedule, max_num_seqs=NUM_REQUESTS) as llm:
            if number == 0:
                print(f"{Path(model).name} on {llm.device_description}")
                print(f"loaded in {perf_counter() - begin:.1f} s\n", flush=True)
                print_answers(llm)
                print_head()
            print_row(schedule, measure_schedule(llm))
    print(f"\nAll done in {perf_counter() - begin:.0f} s. Next: nanoflow bench throughput --help")


def print_answers(llm: LLM) -> None:
    for question, answer in zip(QUESTIONS, answers(llm), strict=True):
        print(f"> {question}\n{answer.strip()}\n", flush=True)


def answers(llm: LLM) -> list[str]:
    """Greedy answers to the questions; a model without a chat template continues them as texts."""
    params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    if llm.get_tokenizer().has_chat_template:
        outputs = llm.chat(conversations, params, use_tqdm=False)
    else:
        outputs = llm.generate(QUESTIONS, params, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def measure_schedule(llm: LLM) -> Measurement:
    """The same requests for every schedule; the warm-up before them is not counted."""
    rng = np.random.default_rng(0)
    special_ids = llm.get_tokenizer().special_ids

    def run(count: int) -> Measurement:
        lengths = random_lengths(INPUT_LEN, OUTPUT_LEN, 0.0, count, rng)
        requests: list[Request] = random_requests(lengths, llm.vocab_size, special_ids, rng)
        return measure(llm, requests, temperature=0.0, detokenize=True, seed=0, use_tqdm=False)

    run(NUM_WARM_UPS)
    return run(NUM_REQUESTS)


def print_head() -> None:
    print(
        f"{NUM_REQUESTS} requests at once, {INPUT_LEN} tokens in, {OUTPUT_LEN} out, "
        f"after a warm-up of {NUM_WARM_UPS}:\n"
    )
    print(f"{'schedule':12}{'total tok/s':>12}{'output tok/s':>14}{'seconds':>9}  what", flush=True)


def print_row(schedule: str, run: Measurement) -> None:
    total, output = run.total_tokens / run.seconds, run.output_tokens / run.seconds
    what = DESCRIPTIONS[schedule]
    print(f"{schedule:12}{total:12.0f}{output:14.0f}{run.seconds:9.1f}  {what}", flush=True)
