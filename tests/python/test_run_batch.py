"""`nanoflow run-batch` on a tiny model: answers, bad lines, and kills at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nanoflow import LLM, SamplingParams
from nanoflow.cli import main
from nanoflow.run_batch.files import OutputFile, line_id

FLAGS = ["--device", "cpu", "--cpu-threads", "1", "--max-model-len", "96", "--block-size", "8"]
MAIN = "from nanoflow.cli import main; raise SystemExit(main())"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def entry(number: int, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    what = {"prompt": f"number {number}"} if url == COMPLETIONS else {}
    return {
        "custom_id": f"request-{number}",
        "method": "POST",
        "url": url,
        "body": {"max_tokens": 6, "temperature": 0, "ignore_eos": True, **what, **body},
    }


def write(path: Path, entries: list[Any]) -> Path:
    lines = (one if isinstance(one, str) else json.dumps(one) for one in entries)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def read(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    answers = {line["custom_id"]: line for line in lines}
    assert len(answers) == len(lines), "a request is answered twice"
    return answers


def command(model: Path, source: Path, target: Path, *more: str) -> list[str]:
    return ["run-batch", "-i", str(source), "-o", str(target), "--model", str(model), *FLAGS, *more]


def test_answers_are_those_of_the_llm(model: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "the quick fox"}]
    source = write(
        tmp_path / "in.jsonl",
        [
            *(entry(n) for n in range(5)),
            entry(5, CHAT, messages=messages, logprobs=True, top_logprobs=2),
            entry(
                7,
                structured_outputs={"choice": ["the fox", "a dog"]},
                ignore_eos=False,
                max_tokens=20,
            ),
            entry(8, response_format={"type": "text"}),
            entry(6, prompt=[[1, 5, 9], [3, 4]], temperature=1, seed=3, n=2, logprobs=1),
        ],
    )
    target = tmp_path / "out.jsonl"
    assert main(command(model, source, target, "--served-model-name", "tiny")) == 0
    answers = read(target)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with LLM(model, max_model_len=96, block_size=8, device="cpu") as llm:
        texts = llm.generate([f"number {n}" for n in range(5)], params, use_tqdm=False)
        [chat] = llm.chat(messages, params, use_tqdm=False)
    for number, output in enumerate(texts):
        answer = answers[f"request-{number}"]
        assert answer["error"] is None and answer["response"]["status_code"] == 200
        body = answer["response"]["body"]
        assert body["choices"][0]["text"] == output.outputs[0].text
        assert body["object"] == "text_completion" and body["model"] == "tiny"
        tokens = len(output.prompt_token_ids)
        assert body["usage"] == {
            "prompt_tokens": tokens,
            "completion_tokens": 6,
            "total_tokens": tokens + 6,
        }
    [choice] = answers["request-5"]["response"]["body"]["choices"]
    assert choice["message"] == {"role": "assistant", "content": chat.outputs[0].text}
    assert len(choice["logprobs"]["content"]) == 6
    assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2
    [choice] = answers["request-7"]["response"]["body"]["choices"]
    assert choice["text"] in ("the fox", "a dog")
    assert answers["request-8"]["error"] is None
    several = answers["request-6"]["response"]["body"]["choices"]
    assert [choice["index"] for choice in several] == [0, 1, 2, 3]
    assert len(several[0]["logprobs"]["token_logprobs"]) == 6


def test_bad_lines_fail_alone(model: Path, tmp_path: Path, capsys: Any) -> None:
    text, image = ({"role": "user", "content": [{"type": kind}]} for kind in ("text", "image_url"))
    text["content"] = "hello"
    bad = {
        "no json": ("{nonsense", 400, "the line is no JSON"),
        "url": (entry(1, "/v1/embeddings"), 404, "is not served"),
        "model": (entry(2, model="other"), 404, "the model 'other' is not"),
        "name": (entry(3, tempreature=1), 400, "no parameter 'tempreature'"),
        "value": (entry(4, top_p=3), 400, "top_p=3 must be"),
        "long": (entry(5, prompt=[5] * 100), 400, "the prompt has 100 tokens"),
        "chat": (entry(6, CHAT), 400, "messages must be a list"),
        "format": (entry(10, response_format={"type": "xml"}), 400, "must have the type text"),
        "stream": (entry(7, stream=True), 400, "stream=True is not supported"),
        "tokens": (entry(11, allowed_token_ids=[9999]), 400, "[9999] are outside the vocabulary"),
        "bias": (entry(12, logit_bias=[1]), 400, "logit_bias=[1] must map token ids"),
        "bias of": (entry(13, logit_bias={"the": 1}), 400, "logit_bias={'the': 1} must map"),
        "image": (entry(14, CHAT, messages=[image]), 400, "part 'image_url'; only texts are"),
        "template": (
            entry(15, CHAT, messages=[text], chat_template_kwargs=[1]),
            400,
            "chat_template_kwargs=[1] must map names",
        ),
    }
    good = [entry(8), entry(9)]
    source = write(tmp_path / "in.jsonl", [good[0], *(one[0] for one in bad.values()), good[1]])
    target = tmp_path / "out.jsonl"
    assert main(command(model, source, target)) == 0
    assert f"{len(bad) + 2} requests answered" in capsys.readouterr().out
    by_line = {line["id"]: line for line in map(json.loads, target.read_text().splitlines())}
    assert len(by_line) == len(bad) + 2
    for number, (_, status, message) in enumerate(bad.values(), start=1):
        answer = by_line[line_id(number)]
        assert answer["response"]["status_code"] == answer["error"]["code"] == status
        assert message in answer["error"]["message"]
    for number in (0, len(bad) + 1):
        assert by_line[line_id(number)]["error"] is None


def test_a_line_that_fails_by_our_mistake_is_answered(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanoflow.run_batch.driver.make_body", lambda *_: {}["nothing"])
    source = write(tmp_path / "in.jsonl", [entry(0)])
    assert main(command(model, source, tmp_path / "out.jsonl")) == 0
    answer = read(tmp_path / "out.jsonl")["request-0"]
    assert answer["error"]["code"] == 500 and "KeyError: 'nothing'" in answer["error"]["message"]


def test_an_output_that_cannot_be_written_ends_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OutputFile, "append", full)
    source = write(tmp_path / "in.jsonl", [entry(number) for number in range(3)])
    assert main(command(model, source, tmp_path / "out.jsonl")) == 1
    assert "No space left on device" in capsys.readouterr().err


def start(model: Path, source: Path, target: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *command(model, source, target, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no answers come"
        time.sleep(0.002)


def processes_of(session: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def test_kills_lose_and_repeat_nothing(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [entry(n, max_tokens=3 + n % 30) for n in range(200)])
    target = tmp_path / "out.jsonl"
    for kill in range(3):
        process = start(model, source, target, "--max-num-seqs", "8")
        wait_for_lines(target, 40 * (kill + 1), process)
        process.kill()
        process.communicate()
        assert processes_of(process.pid) == [], "it leaves a process behind"
        with target.open("ab") as file:  # as if the kill had hit the write
            file.write(b'{"id": "nanoflow-batch-199", "custom_id": "requ'[: 10 + 15 * kill])
    process = start(model, source, target, "--max-num-seqs", "8")
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
    answers = read(target)
    assert answers.keys() == {f"request-{n}" for n in range(200)}
    for number in range(200):
        usage = answers[f"request-{number}"]["response"]["body"]["usage"]
        assert usage["completion_tokens"] == 3 + number % 30
    before = target.read_bytes()
    assert main(command(model, source, target)) == 0  # nothing is left to do
    assert target.read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_the_next_run_goes_on(
    model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    source = write(tmp_path / "in.jsonl", [entry(n, max_tokens=60) for n in range(300)])
    target = tmp_path / "out.jsonl"
    process = start(model, source, target, "--max-num-seqs", "4")
    wait_for_lines(target, 8, process)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "run the same command again to continue" in out
    answers = read(target)
    assert 8 <= len(answers) < 300
    assert all(answer["error"] is None for answer in answers.values())
    assert main(command(model, source, target)) == 0
    assert read(target).keys() == {f"request-{n}" for n in range(300)}


@pytest.mark.parametrize("twice", [True, False])
def test_a_drain_is_bounded(model: Path, tmp_path: Path, twice: bool) -> None:
    source = write(tmp_path / "in.jsonl", [entry(n, max_tokens=88 if n else 2) for n in range(500)])
    target = tmp_path / "out.jsonl"
    seconds = "600" if twice else "0.01"
    flags = ("--max-num-seqs", "400")
    process = start(model, source, target, *flags, "--shutdown-timeout", seconds)
    wait_for_lines(target, 1, process)
    process.send_signal(signal.SIGINT)
    if twice:
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert time.monotonic() - begin < 10
    assert len(read(target)) < 500


def test_a_killed_bench_leaves_no_child(model: Path) -> None:
    """`bench startup` is the one command with processes of its own."""
    flags = ["--model", str(model), "--device", "cpu", "--num-iters-warm", "50"]
    command = [sys.executable, "-c", MAIN, "bench", "startup", *flags]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(processes_of(parent.pid)) < 2 or not prctl_is_set(parent.pid):
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    while processes_of(parent.pid):
        assert time.monotonic() < deadline, "a start goes on without its parent"
        time.sleep(0.01)


def prctl_is_set(session: int) -> bool:
    """Whether the child has got as far as to import nanoflow, behind its prctl."""
    for process in processes_of(session):
        try:
            is_child = b"start_seconds" in Path(f"/proc/{process}/cmdline").read_bytes()
            maps = Path(f"/proc/{process}/maps").read_text()
        except OSError:
            continue
        if is_child and "_core" in maps:
            return True
    return False


def test_an_output_of_others_is_refused(model: Path, tmp_path: Path, capsys: Any) -> None:
    source = write(tmp_path / "in.jsonl", [entry(0)])
    target = tmp_path / "out.jsonl"
    assert main(command(model, source, target)) == 0
    write(source, [entry(1)])
    assert main(command(model, source, target)) == 1
    assert "answers other requests: its answer to line 1" in capsys.readouterr().err
    assert main(command(model, source, target, "--shutdown-timeout", "-1")) == 1
    assert "--shutdown-timeout -1.0 must be at least 0" in capsys.readouterr().err
    with OutputFile(target):
        assert main(command(model, source, target)) == 1
    assert "another process writes" in capsys.readouterr().err
    target.write_text('{"id": "vllm-1", "custom_id": "x"}\n')
    assert main(command(model, source, target)) == 1
    assert "a line that run-batch did not write" in capsys.readouterr().err
    assert main(command(model, source, target, "--overwrite")) == 0
    assert read(target).keys() == {"request-1"}


def test_lines_of_a_million_requests_take_four_bytes_each(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with path.open("w") as file:
        for number in range(0, 200_000, 7):
            file.write(json.dumps({"id": line_id(number), "custom_id": str(number)}) + "\n")
    with OutputFile(path) as output:
        assert output.num_done == len(range(0, 200_000, 7))
        assert output._done._sums.buffer_info()[1] * 4 < 1_000_000
        assert output.is_done(7, b'{"custom_id": "7"}')
        assert not output.is_done(8, b'{"custom_id": "8"}')
        assert not output.is_done(300_000, b"{}")
    assert os.path.getsize(path) > 0
