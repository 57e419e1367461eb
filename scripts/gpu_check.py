#!/usr/bin/env python3
"""What a machine's GPU really does with Unisono: is every operation right, do runs give one result, how fast is it.

    scripts/gpu_check.py [--device cuda|cpu] [--programs DIR] [--out DIR] [--seconds 460] [--only PART,...]

Needs python3 with torch 2.11.0 (CUDA 13) and the two programs; no compiler and no network. Parts run one after another, each
within its share of the time; one that fails does not stop the next. After each, gpu_check.json and gpu_check.md in --out
are written anew. With --device cpu the same parts run on a processor with tiny shapes: so that a GPU is never the first to
run them. Exits with 1 if something that ran was not as it should be.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Shapes of models that people know: config.json without weights, which speed does not depend on.
SHAPES = {
    "Qwen2.5-0.5B": dict(model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                         num_attention_heads=14, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
                         rope_theta=1e6, rms_norm_eps=1e-6),
    "Qwen2.5-1.5B": dict(model_type="qwen2", hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                         num_attention_heads=12, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
                         rope_theta=1e6, rms_norm_eps=1e-6),
    "Llama-3.1-8B": dict(model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
                         rope_theta=5e5, rms_norm_eps=1e-5),
    "tiny": dict(model_type="qwen2", hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, vocab_size=1000, tie_word_embeddings=True, rope_theta=1e6, rms_norm_eps=1e-6),
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--programs", type=pathlib.Path, help="directory of unisono and unisono-worker")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(os.environ.get("OUT", ".")))
    parser.add_argument("--seconds", type=float, default=460)
    parser.add_argument("--only", help="parts, by name")
    options = parser.parse_args()
    if options.programs is None:
        places = [ROOT / "target" / place for place in ("gpu", "release", "debug")]
        options.programs = next((p for p in places if (p / "unisono-worker").exists()), places[0])
    return options


class Check:
    def __init__(self, options):
        self.options, self.started = options, time.time()
        self.tiny = options.device == "cpu"
        self.parts, self.bad = {}, 0
        self.scratch = pathlib.Path(tempfile.mkdtemp(prefix="unisono-gpu-check-"))
        self.environment = dict(os.environ)
        options.out.mkdir(parents=True, exist_ok=True)
        # The worker remembers the libtorch it was built with. Carried to another machine, it takes that of this python.
        if self.call("unisono-worker", "--version", seconds=30)[0] != 0:
            self.environment["LD_LIBRARY_PATH"] = ":".join(map(str, self.libraries()))

    def libraries(self):
        """Where the libtorch of this python is, and the CUDA that came with it."""
        found = importlib.util.find_spec("torch")
        if found is None or not found.origin:
            return [p for p in os.environ.get("LD_LIBRARY_PATH", "").split(":") if p]
        torch = pathlib.Path(found.origin).parent
        return [torch / "lib", *sorted(torch.parent.glob("nvidia/*/lib"))]

    def left(self):
        return self.options.seconds - (time.time() - self.started)

    def call(self, program, *words, seconds, environment=None):
        """Runs one of the two programs; its output, and its exit code."""
        command = [str(self.options.programs / program), *map(str, words)]
        environment = {**self.environment, **(environment or {})}
        seconds = max(1.0, min(seconds, self.left()))
        with tempfile.TemporaryFile("w+") as errors:
            try:
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
                                      timeout=seconds, cwd=self.scratch)
                code, output = done.returncode, done.stdout
            except subprocess.TimeoutExpired as late:
                output = late.stdout or ""
                code, output = None, output if isinstance(output, str) else output.decode()
            errors.seek(0)
            said = errors.read()[-3000:]
        if code is None:
            said = f"not done after {seconds:.0f} s\n{said}"
        return code, output, said

    def selftest(self, *words, seconds):
        """Findings of the worker's own test; those that are bad, and what it said if it did not end well, go into the report."""
        code, output, said = self.call("unisono-worker", "selftest", *words, "--device", self.options.device, seconds=seconds)
        findings = events(output)
        bad = [f for f in findings if f.get("good") is False]
        result = {"good": code == 0 and not bad, "checked": len(findings), "bad": bad}
        if code != 0:
            result["said"] = said
        return result, findings

    def run(self):
        parts = [machine, operations, models, goldens, runs, placements, nccl, speed, plans, settle, peer]
        wanted = self.options.only.split(",") if self.options.only else [part.__name__ for part in parts]
        for part in parts:
            if part.__name__ not in wanted:
                continue
            begun = time.time()
            if self.left() < 5:
                result = {"good": None, "said": "no time was left"}
            else:
                try:
                    result = part(self)
                except Exception as problem:  # The next part may still have something to say.
                    result = {"good": False, "said": f"{type(problem).__name__}: {problem}"}
            result["took"] = round(time.time() - begun, 1)
            self.parts[part.__name__] = result
            self.bad += result.get("good") is False
            mark = {True: "good", False: "BAD", None: "not run"}[result.get("good")]
            print(f"{part.__name__:<12} {mark:<8} {result['took']:6.1f} s", flush=True)
            self.write()
        shutil.rmtree(self.scratch, ignore_errors=True)
        return 1 if self.bad else 0

    def write(self):
        report = {"device": self.options.device, "seconds": round(time.time() - self.started, 1), "parts": self.parts}
        (self.options.out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
        (self.options.out / "gpu_check.md").write_text(table(report))


def machine(check):
    """What the machine is. Without a working program nothing else can be known."""
    code, output, said = check.call("unisono-worker", "--version", seconds=30)
    result = {"good": code == 0, "version": output.strip(), "said": said}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,clocks.sm", "--format=csv,noheader"]
        result["gpus"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    if importlib.util.find_spec("torch"):
        import torch
        result["torch"] = torch.__version__
    return result


def operations(check):
    return check.selftest("operations", seconds=90)[0]


def models(check):
    if check.tiny and os.environ.get("UNISONO_GPU_CHECK_QUICK"):
        return {"good": None, "said": "left out: the worker's own tests run it"}
    return check.selftest("models", seconds=90)[0]


def goldens(check):
    return check.selftest("goldens", ROOT / "goldens", seconds=60)[0]


def material(check):
    """Rows and a small model for runs, made once; or what went wrong."""
    rows, model = check.scratch / "rows.jsonl", check.scratch / "model"
    if model.exists():
        return rows, model, None
    words = "one note many voices sing the same song again and again until it is right".split()
    with rows.open("w") as file:
        for i in range(200):
            prompt = " ".join(words[(i + j) % len(words)] for j in range(4 + i % 7))
            file.write(json.dumps({"prompt": f"{i}: {prompt}", "completion": f" {words[i % len(words)]} {i * 7 % 100}"}) + "\n")
    shape = ["--vocab", 300, "--layers", 2, "--hidden", 128, "--heads", 2] if check.tiny else \
        ["--vocab", 600, "--layers", 8, "--hidden", 1024, "--heads", 16, "--kv-heads", 4]
    code, _, said = check.call("unisono", "init-model", model, "--data", rows, *shape, seconds=60)
    return rows, model, None if code == 0 else said


def settings_of(check):
    return ["train.steps=4", "train.global_batch_size=32", "train.micro_batches=8", "split.validation=0", "split.test=0",
            "eval.every=0", f"cluster.device={check.options.device}"]


def trained(check, name, counts, more=(), environment=None):
    """The same short run with each number of workers: one digest?"""
    rows, model, said = material(check)
    if said is not None:
        return {"good": False, "said": said}
    result, digests = {"good": True, "runs": []}, set()
    for workers in counts:
        run = check.scratch / f"{name}-{workers}"
        settings = [*settings_of(check), *more]
        code, output, said = check.call(
            "unisono", "train", "--json", "--model", model, "--data", rows, "--workers", workers, "--run-dir", run,
            *(word for setting in settings for word in ("--set", setting)), seconds=60, environment=environment)
        if code != 0:
            result["good"] = False
            result["runs"].append({"workers": workers, "said": said})
            continue
        told = events(output)
        steps = [e for e in told if e["event"] == "step"]
        memory = [e for e in told if e["event"] == "memory"]
        code, digest, said = check.call("unisono", "digest", run, seconds=30)
        digests.add(digest.strip())
        result["runs"].append({
            "workers": workers, "digest": digest.strip(), "losses": [s["loss"] for s in steps],
            "tokens_per_second": sum(s["tokens"] for s in steps[1:]) / max(1e-9, sum(s["seconds"] for s in steps[1:])),
            "planned_bytes": max((e["planned_bytes"] for e in memory), default=None),
            "peak_bytes": max((e["peak_bytes"] for e in memory), default=None),
            "gpu_peak_bytes": max((e["gpu"]["peak_bytes"] for e in memory if "gpu" in e), default=None)})
    result["one_result"] = len(digests) == 1 and result["good"]
    result["good"] = result["one_result"]
    return result


def runs(check):
    """One result for one, two and four workers on this device; planned memory against what was really taken."""
    return trained(check, "run", (1, 2, 4), ["cluster.transport=tcp"])


def events(output):
    """What a program told with --json, line by line."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def gpu_bytes():
    """Bytes of the GPU that are in use now, by whomever."""
    if not shutil.which("nvidia-smi"):
        return 0
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return int(lines[0]) << 20 if lines and lines[0].isdigit() else 0


class Watch:
    """The most that the GPU has in use meanwhile, beyond what it had before."""

    def __enter__(self):
        self.before, self.most, self.over = gpu_bytes(), 0, threading.Event()

        def look():
            while not self.over.wait(0.2):
                self.most = max(self.most, gpu_bytes() - self.before)
        self.thread = threading.Thread(target=look)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


def foreseen(check, model, settings):
    """What `unisono check` says of the memory of a run of one worker with these settings."""
    rows, _, _ = material(check)
    code, output, said = check.call(
        "unisono", "check", "--json", "--model", model, "--data", rows, "--workers", 1,
        *(word for setting in settings for word in ("--set", setting)), seconds=40)
    found = next((e for e in events(output) if e.get("event") == "memory"), None)
    return found or {"fits": False, "said": said}


def placements(check):
    """Sums and state on the GPU or on the host, fp32 and bf16: one result; memory planned against what the GPU really held."""
    result = {"good": True, "placements": []}
    states = ("fp32", "bf16")
    for state in states:
        digests = set()
        # A processor has no other place to leave anything at.
        for offload in ("nothing", "all") if check.tiny else ("nothing", "masters", "moments", "state", "all"):
            more = [f"cluster.offload={offload}", f"train.optimizer_state={state}", "model.compute=bf16", "cluster.transport=tcp"]
            with Watch() as watch:
                one = trained(check, f"placed-{state}-{offload}", (1,), more)
            run = one["runs"][0] if one.get("runs") else {}
            digests.add(run.get("digest"))
            plan = foreseen(check, check.scratch / "model", [*settings_of(check), *more])
            result["good"] &= one["good"] and plan["fits"]
            result["placements"].append({"state": state, "offload": offload, "digest": run.get("digest"), "said": run.get("said"),
                                         "gpu_planned_bytes": plan.get("gpu_total_bytes", 0), "gpu_peak_bytes": watch.most})
        result["good"] &= len(digests) == 1 and None not in digests
    # What is not loaded before the first step is in nobody's plan: the context. A plan that is too small would end in the night.
    result["within"] = all(p["gpu_peak_bytes"] <= 1.05 * p["gpu_planned_bytes"] + (1 << 30) for p in result["placements"]) \
        if not check.tiny else None
    result["good"] &= result["within"] is not False
    return result


def plans(check):
    """Where models that people know fit this GPU: nothing is loaded."""
    if check.tiny:
        return {"good": None, "said": "only where there is a GPU; the worker's own tests plan for one that is not there"}
    _, _, said = material(check)
    if said is not None:
        return {"good": False, "said": said}
    result = {"good": True, "plans": []}
    for name in ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Llama-3.1-8B"):
        directory = check.scratch / f"plan-{name}"
        if not directory.exists():
            shutil.copytree(check.scratch / "model", directory)
            config = json.loads((directory / "config.json").read_text())
            (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096, **SHAPES[name]}))
        found = foreseen(check, directory, ["cluster.device=cuda", "model.compute=bf16", "train.micro_batches=8"])
        keys = ("fits", "total_bytes", "gpu_total_bytes", "gpu_available_bytes", "offload", "recompute", "remedy", "said")
        result["plans"].append({"model": name, **{key: found.get(key) for key in keys}})
        result["good"] &= bool(found.get("gpu_total_bytes")) and found["fits"]
    return result


def nccl(check):
    """The same with sums and parameters over NCCL: workers share the one GPU, which NCCL allows only to those that it takes
    for different hosts, so each says that it is one. On a processor, over TCP."""
    program = (check.options.programs / "unisono-worker").resolve()
    apart = check.scratch / "unisono-worker-apart"
    apart.write_text(f"#!/bin/sh\nexport NCCL_HOSTID=worker-$$\nexec '{program}' \"$@\"\n")
    apart.chmod(0o755)
    transport = "tcp" if check.tiny else "nccl"
    # A hang must not take the time of what follows.
    more = [f"cluster.transport={transport}", "cluster.peer_timeout=20", "cluster.restarts=0"]
    environment = {"UNISONO_WORKER": str(apart), "NCCL_DEBUG": "WARN", "UNISONO_LOG": "unisono_worker=info"}
    result = trained(check, "nccl", (1, 2, 4), more, environment)
    result["transport"] = transport
    over_tcp = {run.get("digest") for run in check.parts.get("runs", {}).get("runs", [])}
    if result["good"] and over_tcp:
        result["good"] = result["as_over_tcp"] = {run["digest"] for run in result["runs"]} == over_tcp
    return result


def speed(check):
    """Forward and backward passes, sequences of 1,024 tokens packed."""
    if check.tiny:
        plan = [("tiny", 256, 64, 1.0, "nothing")]
    else:
        plan = [("Qwen2.5-0.5B", 16384, 1024, 1.0, "nothing"), ("Qwen2.5-1.5B", 16384, 1024, 1.0, "nothing"),
                ("Qwen2.5-1.5B", 16384, 192, 0.5, "nothing"), ("Llama-3.1-8B", 8192, 1024, 1.0, "norms")]
    result = {"good": True, "loads": []}
    for name, tokens, document, share, recompute in plan:
        directory = check.scratch / name
        directory.mkdir(exist_ok=True)
        config = dict(hidden_act="silu", max_position_embeddings=4096, **SHAPES[name])
        (directory / "config.json").write_text(json.dumps(config))
        one, findings = check.selftest("speed", "--model", directory, "--tokens", tokens, "--document", document, "--share",
                                       share, "--passes", 2 if check.tiny else 6, "--recompute", recompute, seconds=70)
        result["good"] &= one["good"]
        result["loads"].append({**(findings[-1] if findings else {}), **({} if one["good"] else {"said": one.get("said")})})
    return result


def clock(work, device, times):
    """Seconds of one call, after two to warm up."""
    import torch
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    work(), work()
    wait()
    begun = time.time()
    for _ in range(times):
        work()
    wait()
    return (time.time() - begun) / times


def settle(check):
    """Which of ATen's operations to use: questions that only a GPU answers."""
    if not importlib.util.find_spec("torch"):
        return {"good": None, "said": "this python has no torch"}
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    device, times, answers = check.options.device, 3 if check.tiny else 20, {}
    rows, sequence = (2, 64) if check.tiny else (16, 1024)

    def answer(name, work):
        try:
            answers[name] = work()
        except Exception as problem:  # "Not on this device" is an answer too.
            answers[name] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:200]}"

    def attention(dim, backend, shared):
        q = torch.randn(rows, 16, sequence, dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        heads = 4 if shared else 16
        k, v = (torch.randn(rows, heads, sequence, dim, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in "kv")

        def work():
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
            out.backward(out, retain_graph=False)
            q.grad = k.grad = v.grad = None
        seconds = clock(work, device, times)
        return {"ms": 1e3 * seconds, "tflops": 3.5 * 2 * rows * 16 * sequence * sequence * dim / seconds / 1e12}

    for dim in (64, 128):
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            answer(f"(c) {name} forward and backward of {dim}", lambda: attention(dim, backend, False))
    answer("(a) cudnn with shared keys", lambda: attention(128, SDPBackend.CUDNN_ATTENTION, True))

    def varlen_cudnn():
        lengths = torch.tensor([0, sequence // 2, sequence, 2 * sequence], device=device, dtype=torch.int32)
        q, k, v = (torch.randn(2 * sequence, 4, 64, device=device, dtype=torch.bfloat16) for _ in "qkv")
        call = lambda: torch.ops.aten._cudnn_attention_forward(q, k, v, None, lengths, lengths, sequence, sequence, True, 0.0, True)
        return {"ms": 1e3 * clock(call, device, times)}

    def varlen_flash():
        lengths = torch.arange(0, rows + 1, device=device, dtype=torch.int32) * sequence
        q, k, v = (torch.randn(rows * sequence, 16, 128, device=device, dtype=torch.bfloat16) for _ in "qkv")
        call = lambda: torch.ops.aten._flash_attention_forward(q, k, v, lengths, lengths, sequence, sequence, 0.0, True, False)
        seconds = clock(call, device, times)
        return {"ms": 1e3 * seconds, "tflops": 2 * rows * 16 * sequence * sequence * 128 / seconds / 1e12}

    answer("(b) cudnn of variable length, per call", varlen_cudnn)
    answer("(b) flash of variable length, forward", varlen_flash)

    def accumulate():
        a, b = (torch.randn(64 if check.tiny else 4096, 64 if check.tiny else 4096, device=device, dtype=torch.bfloat16) for _ in "ab")
        total = torch.zeros(a.shape[0], b.shape[1], device=device)
        expected = total + 2 * (a.float() @ b.float())
        for _ in range(2):
            torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
        off = ((total - expected).norm() / expected.norm()).item()
        call = lambda: torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
        plain = lambda: total.add_(a @ b)
        return {"off": off, "in_place_ms": 1e3 * clock(call, device, times), "apart_ms": 1e3 * clock(plain, device, times)}

    answer("(d) addmm into its own fp32 operand", accumulate)
    for width in (64,) if check.tiny else (896, 1536, 4096):
        def gemm(tokens=rows * sequence, width=width):
            x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
            w = torch.randn(4 * width, width, device=device, dtype=torch.bfloat16)
            seconds = clock(lambda: x @ w.T, device, times)
            return {"tflops": 2 * tokens * width * 4 * width / seconds / 1e12}
        answer(f"(e) matrix product of width {width}", gemm)

    def scaled(by_row):
        n = 64 if check.tiny else 4096
        a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in "ab")
        shape = ((n, 1), (1, n)) if by_row else ((), ())
        scales = [torch.ones(s, device=device) for s in shape]
        call = lambda: torch._scaled_mm(a, b.T, scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16)
        return {"tflops": 2 * n ** 3 / clock(call, device, times) / 1e12}

    answer("(f) fp8 with one scale", lambda: scaled(False))
    answer("(f) fp8 with a scale for each row", lambda: scaled(True))
    return {"good": True, "answers": answers}


def peer(check):
    """What transformers with torch.compile reaches on the same packed sequences: forward and backward, and whole steps."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        return {"good": None, "said": "this python lacks torch or transformers"}
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    device, result = check.options.device, {"good": True, "loads": []}
    plan = [("tiny", 2, 64)] if check.tiny else [("Qwen2.5-0.5B", 16, 1024), ("Qwen2.5-1.5B", 16, 1024)]
    for name, rows, sequence in plan:
        if check.left() < (5 if check.tiny else 40):
            result["loads"].append({"model": name, "said": "no time was left"})
            continue
        shape = dict(SHAPES[name])
        config = AutoConfig.for_model(shape.pop("model_type"), hidden_act="silu", max_position_embeddings=4096, **shape)
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        tokens = torch.randint(config.vocab_size, (rows, sequence), device=device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
        for compiled in (False, True):
            if compiled and (check.tiny or check.left() < 60):
                continue
            run = torch.compile(model) if compiled else model

            def passes():
                run(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

            def step():
                passes()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            # Without dropping them between passes gradients would be added up, which costs memory bandwidth of its own.
            alone = clock(lambda: (passes(), optimizer.zero_grad(set_to_none=True)), device, 2 if check.tiny else 6)
            whole = clock(step, device, 2 if check.tiny else 6)
            result["loads"].append({"model": name, "compiled": compiled, "passes_tokens_per_second": rows * sequence / alone,
                                    "step_tokens_per_second": rows * sequence / whole})
        del model, optimizer
        if device == "cuda":
            torch.cuda.empty_cache()
    return result


def table(report):
    """The findings for people."""
    lines = [f"Device `{report['device']}`, {report['seconds']:.0f} s."]

    def section(columns, rows):
        rows = list(rows)
        if rows:
            lines.extend(["", row(columns), row(["---"] * len(columns)), *map(row, rows)])

    def row(cells):
        return "| " + " | ".join(str(cell) for cell in cells) + " |"

    def found(part, key, needs):
        return [one for one in report["parts"].get(part, {}).get(key, []) if needs in one]

    def outcome(part):
        said = {True: "good", False: "**bad**", None: "not run"}[part.get("good")]
        for one in part.get("bad", [])[:3]:
            said += f"; {one['check']} ({one['form']}, {one['kind']}) off by {one['off']:.1e}, limit {one['limit']:.1e}"
        if part.get("good") is not True and part.get("said"):
            said += "; " + " ".join(part["said"].split())[:300].replace("|", "/")
        return said

    def sizes(one, *keys, digits=2):
        return [f"{one[key] / 1e9:.{digits}f} GB" if one.get(key) else "" for key in keys]

    section(["part", "outcome", "seconds"],
            ([name, outcome(part), part["took"]] for name, part in report["parts"].items()))
    section(["forward and backward", "tokens/s", "TFLOP/s", "share of the matmul rate", "memory"],
            ([f"{load['speed']}, {load['tokens']} tokens in {load['document']}s, {load['targets']:.0%} targets",
              f"{load['tokens_per_second']:,.0f}", f"{load['tflops']:.1f}", f"{load['mfu']:.1%}", f"{load['bytes'] / 1e9:.1f} GB"]
             for load in found("speed", "loads", "speed")))
    section(["transformers", "forward and backward, tokens/s", "whole steps, tokens/s"],
            ([load["model"] + (", compiled" if load["compiled"] else ""), f"{load['passes_tokens_per_second']:,.0f}",
              f"{load['step_tokens_per_second']:,.0f}"] for load in found("peer", "loads", "compiled")))
    over = f" over {report['parts'].get('nccl', {}).get('transport')}"
    runs = [(run, "") for run in found("runs", "runs", "digest")] + [(run, over) for run in found("nccl", "runs", "digest")]
    section(["workers on one device", "digest", "tokens/s", "planned", "peak"],
            ([f"{run['workers']}{way}", f"`{run['digest'][:20]}`", f"{run['tokens_per_second']:,.0f}",
              *sizes(run, "planned_bytes", "peak_bytes")] for run, way in runs))
    section(["state", "on the host", "digest", "planned on the GPU", "held there"],
            ([one["state"], one["offload"], f"`{(one['digest'] or '')[:20]}`",
              *sizes(one, "gpu_planned_bytes", "gpu_peak_bytes")] for one in found("placements", "placements", "state")))
    section(["model", "planned on the GPU", "on the host", "left there", "computed again"],
            ([one["model"], *sizes(one, "gpu_total_bytes", "total_bytes", digits=1), one.get("offload"), one.get("recompute")]
             for one in found("plans", "plans", "model")))

    def answer(found):
        return found if isinstance(found, str) else ", ".join(f"{key} {value:.3g}" for key, value in found.items())

    answers = report["parts"].get("settle", {}).get("answers") or {}
    section(["question", "answer"], ([name, answer(given).replace("|", "/")] for name, given in answers.items()))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(Check(arguments()).run())
