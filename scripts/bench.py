#!/usr/bin/env python3
"""Ours and what one would use instead, in turn and in one sitting, on the same model and data.

    scripts/bench.py [MODEL TRAIN_JSONL] [--peers DIR] [--python PYTHON] [--rounds 2] [--out DIR] [--only TEXT]

MODEL is a Hugging Face directory, TRAIN_JSONL has "question" and "answer" in every row; without them both are made, with 47
million random weights and made-up rows, and only we can be measured. DIR of --peers holds trl_sft.py and
torch_eager.py, which PYTHON (with torch, transformers and trl) runs. Each peer's turn lies between two of ours, and a ratio
is the peer's against the mean of its two neighbours. Real tokens are counted, never padding; the first quarter of the steps
is left out. Writes bench.json and bench.md into --out (default: the current directory), and the table to standard output.
"""

import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

PAGE = os.sysconf("SC_PAGE_SIZE")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, nargs="?")
    parser.add_argument("data", type=pathlib.Path, nargs="?")
    parser.add_argument("--peers", type=pathlib.Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--unisono", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."))
    parser.add_argument("--only", help="only the settings whose name has this in it: small, large, two")
    parser.add_argument("--set", action="append", default=[], help="passed on to unisono train")
    return parser.parse_args()


def tree(root):
    """Process ids of `root` and all that descend from it."""
    children = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                text = pathlib.Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue  # It ended meanwhile.
            children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(entry))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


def number(path, key):
    try:
        for line in pathlib.Path(path).read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0


class Memory(threading.Thread):
    """Looks at a process tree until told to stop: the most proportional memory of all together, and the highest peak of
    one process."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.all, self.one, self.over = pid, 0, 0, threading.Event()

    def run(self):
        while not self.over.wait(0.5):
            pids = tree(self.pid)
            self.all = max(self.all, sum(number(f"/proc/{p}/smaps_rollup", "Pss:") for p in pids))
            self.one = max([self.one, *(number(f"/proc/{p}/status", "VmHWM:") for p in pids)])


def watch(command, environment, first):
    """Runs `command`; its output lines, seconds until one has `first` in it, memory."""
    started = time.time()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **environment},
                                   start_new_session=True)
        memory = Memory(process.pid)
        memory.start()
        try:
            lines, seen = [], None
            for line in process.stdout:
                lines.append(line)
                if seen is None and first in line:
                    seen = time.time() - started
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        memory.over.set()
        memory.join()
        if code != 0:
            log.seek(0)
            sys.exit(f"{' '.join(map(str, command))}\nfailed with {code}:\n{log.read()[-2000:]}")
    return lines, seen, time.time() - started, memory


def ours(opts, scratch, workers, rows, micro_batches):
    out = pathlib.Path(tempfile.mkdtemp(dir=scratch)) / "run"
    template = [] if opts.made else ["data.template=Question: {{ question }}\\nAnswer:||| {{ answer }}"]
    settings = [*template, "model.compute=bf16",
                f"train.global_batch_size={rows}", f"train.micro_batches={micro_batches}", f"train.steps={opts.steps}",
                "train.learning_rate=1e-3", "train.schedule=constant", "split.validation=0", "split.test=0", "eval.every=0",
                *opts.set]
    command = [opts.unisono, "train", "--json", "--model", opts.model, "--data", opts.data, "--workers", str(workers),
               "--run-dir", out, *(word for setting in settings for word in ("--set", setting))]
    lines, first, _, memory = watch(command, {}, '"event":"step"')
    events = [json.loads(line) for line in lines]
    steps = [event for event in events if event["event"] == "step"]
    late = steps[len(steps) // 4:]
    peaks = [event["peak_bytes"] for event in events if event["event"] == "memory"]
    return {"rate": sum(s["tokens"] for s in late) / sum(s["seconds"] for s in late), "start": first, "all": memory.all,
            "one": max([memory.one, *peaks]), "tokens_per_step": statistics.mean(s["tokens"] for s in late),
            "document": sum(s["tokens"] for s in late) / sum(s["examples"] for s in late)}


def trl(opts, processes, rows):
    script = [opts.peers / "trl_sft.py", "bf16", opts.model, opts.data, "--steps", str(opts.steps)]
    if processes == 1:
        command, threads = [opts.python, *script, "--batch", str(rows)], "2"
    else:
        launch = [opts.python, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command, threads = [*launch, *script, "--batch", str(rows // processes)], "1"
    lines, first, _, memory = watch(command, {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}, "'loss'")
    last = json.loads([line for line in lines if line.startswith('{"peer"')][-1])
    return {"rate": last["tokens_per_second"], "start": first, "all": memory.all, "one": memory.one}


def loop(opts, tokens, rows, compiled):
    command = [opts.python, opts.peers / "torch_eager.py", opts.model, "--tokens", str(tokens), "--rows", str(rows),
               "--steps", str(opts.steps), *(["--compile"] if compiled else [])]
    lines, _, seconds, memory = watch(command, {}, "\0")
    rate = json.loads(lines[-1])["tokens_per_second"]
    return {"rate": rate, "start": seconds - (opts.steps - 1) * tokens / rate, "all": memory.all, "one": memory.one}


def matmul(opts, threads):
    """The best bf16 rate of large products, FLOP/s."""
    program = f"""
import time, torch
torch.set_num_threads({threads})
best = 0.0
for n in (1024, 2048, 4096):
    a, b = torch.randn(n, n).bfloat16(), torch.randn(n, n).bfloat16()
    a @ b
    for _ in range(max(3, 3 * (2048 // n) ** 3)):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
print(best)
"""
    done = subprocess.run([opts.python, "-c", program], capture_output=True, text=True, check=True)
    return float(done.stdout)


def flops_per_token(model, length):
    """6 (block matrices + V C) + 6 L Hq D S, S being the mean document."""
    c = json.loads((model / "config.json").read_text())
    hidden, layers, heads = c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"]
    dim = c.get("head_dim") or hidden // heads
    kv = c.get("num_key_value_heads", heads)
    block = hidden * dim * (2 * heads + 2 * kv) + 3 * hidden * c["intermediate_size"]
    return 6 * (layers * block + c["vocab_size"] * hidden) + 6 * layers * heads * dim * length


def make(opts, scratch):
    """A model and rows for it."""
    opts.made, opts.peers = True, None
    opts.model, opts.data = pathlib.Path(scratch, "model"), pathlib.Path(scratch, "rows.jsonl")
    rows = pathlib.Path(__file__).with_name("word_problems.py")
    subprocess.run([sys.executable, rows, "4000", opts.data], check=True, stdout=subprocess.DEVNULL)
    shape = ["--hidden", "576", "--intermediate", "1536", "--layers", "12", "--heads", "9", "--kv-heads", "3"]
    subprocess.run([opts.unisono, "init-model", opts.model, "--data", opts.data, *shape], check=True, stdout=subprocess.DEVNULL)


def spread(values, digits=2):
    low, high = min(values), max(values)
    return f"{low:.{digits}f}" if f"{low:.{digits}f}" == f"{high:.{digits}f}" else f"{low:.{digits}f} to {high:.{digits}f}"


def show(name, results):
    rate = [r["rate"] for r in results]
    gib = [r["all"] / 2**30 for r in results]
    start = [r["start"] for r in results if r["start"]]
    return (f"| {name} | {spread(rate, 0)} | {spread(gib)} | {spread([r['one'] / 2**30 for r in results])} | "
            f"{spread(start, 1) if start else '-'} | {spread([a / b for a, b in zip(rate, gib)], 0)} |")


def main():
    opts = arguments()
    root = pathlib.Path(__file__).resolve().parent.parent
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", root / "target"))
    opts.unisono = (opts.unisono or target / "release" / "unisono").resolve()
    for path in filter(None, [opts.unisono, opts.model, opts.data]):
        if not path.exists():
            sys.exit(f"{path} is not there" + ("; run make build" if path == opts.unisono else ""))
    if opts.model and not opts.data:
        sys.exit("MODEL needs TRAIN_JSONL beside it")
    settings = [("small: 8 rows a step", dict(workers=2, rows=8, micro_batches=2), [
                    ("TRL, one process, two threads", lambda: trl(opts, 1, 8)),
                    ("TRL, two processes", lambda: trl(opts, 2, 8))]),
                ("large: 8k tokens a step", dict(workers=2, rows=44, micro_batches=8), [
                    ("eager loop, 43 rows of 192", lambda: loop(opts, 8256, 43, False)),
                    ("the same with torch.compile", lambda: loop(opts, 8256, 43, True))]),
                ("two workers against one: 8k tokens a step", dict(workers=2, rows=44, micro_batches=8), [
                    ("ours, one worker", None)])]
    if opts.only:
        settings = [s for s in settings if s[0].startswith(opts.only)]
    processor = next((line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    report = {"machine": f"{os.uname().machine}, {os.cpu_count()} cores, {processor}", "date": time.strftime("%Y-%m-%d"),
              "command": " ".join(sys.argv), "load_before": os.getloadavg()[0], "settings": {}}
    if opts.peers and opts.model:
        report["matmul"] = {str(threads): matmul(opts, threads) for threads in (1, 2)}
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        opts.made = False
        if opts.model:
            opts.model, opts.data = opts.model.resolve(), opts.data.resolve()
        else:
            make(opts, scratch)
        for setting, shape, peers in settings:
            run = lambda shape=shape, **other: ours(opts, scratch, **{**shape, **other})
            contenders = [(name, turn or (lambda: run(workers=1))) for name, turn in peers if opts.peers or turn is None]
            if not contenders:
                continue
            mine, theirs, ratios = [run()], {name: [] for name, _ in contenders}, {name: [] for name, _ in contenders}
            for _ in range(opts.rounds):
                for name, turn in contenders:
                    theirs[name].append(turn())
                    mine.append(run())
                    ratios[name].append((mine[-1]["rate"] + mine[-2]["rate"]) / 2 / theirs[name][-1]["rate"])
                    print(f"{setting}: {name}: {ratios[name][-1]:.2f}", file=sys.stderr, flush=True)
            report["settings"][setting] = {"ours": mine, "peers": theirs, "ratios": ratios}
            lines += [f"**{setting}** ({statistics.mean(m['tokens_per_step'] for m in mine):.0f} tokens)", "",
                      "| | tokens/s | GiB, all processes | GiB, largest process | s to the first step | tokens/s per GiB |",
                      "| --- | ---: | ---: | ---: | ---: | ---: |", show("unisono, two workers", mine)]
            lines += [show(name, theirs[name]) for name, _ in contenders] + [""]
            lines += [f"Ours / {name}: {spread(ratios[name])} times the tokens/s" for name, _ in contenders] + [""]
            if "matmul" in report:
                length = statistics.mean(m["document"] for m in mine)
                share = [m["rate"] * flops_per_token(opts.model, length) / report["matmul"]["2"] for m in mine]
                lines += [f"Model FLOPs: {spread([100 * s for s in share], 0)} % of the best bf16 product "
                          f"({report['matmul']['2'] / 1e9:.0f} GFLOP/s on two threads).", ""]
    opts.out.mkdir(parents=True, exist_ok=True)
    (opts.out / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    head = f"{report['machine']}, {report['date']}, load {report['load_before']:.1f} before"
    text = "\n".join([head, "", *lines])
    (opts.out / "bench.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
