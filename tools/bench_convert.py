"""Benchmarks of the file tools, everything in one run, page cache warm: conversion and MXFP4 repacking against `cp`,
quantisation against gguf, verify against the hash
library, inspect of 20,000 tensors, NumPy decoding of the demo model against one pass of sgemv over its weights.

    python tools/bench_convert.py [--folder DIR] [--rounds 5] [--gigabytes 4.4] [--demo demo/smollm2.lith] [--out JSON]

Commands are timed as whole processes, A B A B, and compared by medians and by ratios within a round. Every result is
checked before it is timed. Needs three times the checkpoint's size on disk and once in the page cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import xxhash
from safetensors.numpy import save_file

import megalith
from megalith.format.constants import CHUNK_BYTES

COMMAND = [sys.executable, "-m", "megalith"]
SHARDS = 2


@dataclass(frozen=True)
class Timing:
    """One finished process."""

    seconds: float
    cpu_seconds: float
    peak_mebibytes: float


def run_timed(command: list[str]) -> Timing:
    """Run a command to its end; its output is thrown away, a failure raises."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    if status:
        message = process.stderr.read().decode() if process.stderr else ""
        raise SystemExit(f"{' '.join(command)} failed: {message}")
    return Timing(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def in_a_process(work: Callable[..., int], *arguments: Any) -> int:
    """Run a memory-hungry function elsewhere: the kernel counts this process's memory to those it starts."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def median(values: list[float]) -> float:
    return statistics.median(values)


def llama_config(num_layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": num_layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "head_dim": hidden // heads, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip


def layer_shapes(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    prefix = f"model.layers.{layer}."
    matrices = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
                "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner)}  # fmt: skip
    vectors = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    return {f"{prefix}{name}.weight": shape for name, shape in {**matrices, **vectors}.items()}


def write_checkpoint(folder: Path, config: dict[str, Any], shards: int) -> int:
    """A checkpoint of random BF16 weights, never zeros; returns its bytes of weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    groups: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    groups[0]["model.embed_tokens.weight"] = (config["vocab_size"], config["hidden_size"])
    groups[-1]["model.norm.weight"] = (config["hidden_size"],)
    for layer in range(config["num_hidden_layers"]):
        groups[layer * shards // config["num_hidden_layers"]] |= layer_shapes(config, layer)
    rng, total, weight_map = np.random.default_rng(0), 0, {}
    for i, group in enumerate(groups):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {}
        for tensor, shape in group.items():
            bits = rng.integers(0, 1 << 16, shape, dtype=np.uint16) & np.uint16(0x8FFF) | np.uint16(0x3000)
            tensors[tensor] = bits.view(ml_dtypes.bfloat16)  # finite: exponents 96 to 127
            total += bits.nbytes
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(group, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def bench_convert(folder: Path, gigabytes: float, rounds: int) -> dict[str, Any]:
    """Conversion against `cp` of the same files, and against cp followed by sync: conversion ends with fsync."""
    per_layer = sum(2 * int(np.prod(s)) for s in layer_shapes(llama_config(1, 2048, 8192, 32, 8, 128_256), 0).values())
    layers = max(1, round((gigabytes * 1e9 - 2 * 2048 * 128_256) / per_layer))
    nbytes = in_a_process(write_checkpoint, folder / "source", llama_config(layers, 2048, 8192, 32, 8, 128_256), SHARDS)
    target = folder / "model.lith"
    convert = [*COMMAND, "convert", str(folder / "source"), str(target), "--force", "--no-progress"]
    run_timed(convert)
    check = subprocess.run([*COMMAND, "verify", str(target), "--against", str(folder / "source")], check=False)
    if check.returncode:
        raise SystemExit("the converted file does not match its checkpoint")
    copy, synced = folder / "copy", f"cp -r {folder / 'source'} {folder / 'copy'} && sync {folder / 'copy'}/*"
    runs: dict[str, list[Timing]] = {"cp": [], "cp and sync": [], "convert": [], "convert --json": []}
    for _ in range(rounds):
        for name, command in (
            ("cp", ["cp", "-r", str(folder / "source"), str(copy)]),
            ("convert", convert),
            ("cp and sync", ["sh", "-c", synced]),
            ("convert --json", [*convert, "--json"]),
        ):
            shutil.rmtree(copy, ignore_errors=True)
            target.unlink(missing_ok=True)
            os.sync()
            runs[name].append(run_timed(command))
    run_timed(convert)
    base = [timing.seconds for timing in runs["cp"]]
    return {
        "weights_bytes": nbytes,
        "seconds": {name: [round(t.seconds, 3) for t in timings] for name, timings in runs.items()},
        "cpu_seconds": {name: [round(t.cpu_seconds, 3) for t in timings] for name, timings in runs.items()},
        "median_ratio_to_cp": {
            name: round(median([t.seconds / b for t, b in zip(timings, base, strict=True)]), 3)
            for name, timings in runs.items()
        },
        "peak_mebibytes": {name: round(max(t.peak_mebibytes for t in timings), 1) for name, timings in runs.items()},
    }


def gpt_oss_config(num_layers: int, num_experts: int, size: int) -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": size, "intermediate_size": size,
        "num_hidden_layers": num_layers, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
        "vocab_size": 1024, "max_position_embeddings": 8192, "num_local_experts": num_experts, "num_experts_per_tok": 4,
        "sliding_window": 128, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip


def write_gpt_oss(folder: Path, config: dict[str, Any]) -> int:
    """A checkpoint with native MXFP4 experts, one shard per layer; returns its bytes of weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    size, experts, rng = config["hidden_size"], config["num_local_experts"], np.random.default_rng(1)
    q, kv = config["num_attention_heads"] * 64, config["num_key_value_heads"] * 64

    def bf16(*shape: int) -> Any:
        bits = rng.integers(0, 1 << 16, shape, dtype=np.uint16) & np.uint16(0x8FFF) | np.uint16(0x3000)
        return bits.view(ml_dtypes.bfloat16)

    def mxfp4(name: str, rows: int) -> dict[str, Any]:
        blocks = rng.integers(0, 256, (experts, rows, size // 32, 16), dtype=np.uint8)
        scales = rng.integers(110, 130, (experts, rows, size // 32), dtype=np.uint8)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": bf16(experts, rows)}

    total, weight_map = 0, {}
    for layer in range(config["num_hidden_layers"]):
        attention = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        inside = {f"self_attn.{name}.weight": bf16(rows, size) for name, rows in attention.items()}
        inside |= {f"self_attn.{name}.bias": bf16(rows) for name, rows in attention.items()}
        inside |= {"self_attn.o_proj.weight": bf16(size, q), "self_attn.o_proj.bias": bf16(size)}
        inside |= {"self_attn.sinks": bf16(8), "mlp.router.weight": bf16(experts, size), "mlp.router.bias": bf16(experts)}
        inside |= {"input_layernorm.weight": bf16(size), "post_attention_layernorm.weight": bf16(size)}
        inside |= mxfp4("mlp.experts.gate_up_proj", 2 * size) | mxfp4("mlp.experts.down_proj", size)
        tensors = {f"model.layers.{layer}.{name}": tensor for name, tensor in inside.items()}
        if layer == 0:
            outer = {"model.embed_tokens.weight": bf16(1024, size), "lm_head.weight": bf16(1024, size)}
            tensors |= {**outer, "model.norm.weight": bf16(size)}
        name = f"model-{layer:05d}.safetensors"
        save_file(tensors, folder / name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def bench_mxfp4_repack(folder: Path, rounds: int) -> dict[str, Any]:
    """Repacking native MXFP4, 128 experts a layer, against `cp` of the same files."""
    source, target, copy = folder / "gpt-oss", folder / "gpt-oss.lith", folder / "gpt-oss-copy"
    nbytes = in_a_process(write_gpt_oss, source, gpt_oss_config(3, 128, 2880))
    convert = [*COMMAND, "convert", str(source), str(target), "--force", "--no-progress"]
    run_timed(convert)
    if subprocess.run([*COMMAND, "verify", str(target), "--against", str(source)], check=False).returncode:
        raise SystemExit("the repacked file does not match its checkpoint")
    runs: dict[str, list[Timing]] = {"cp": [], "convert": []}
    for _ in range(rounds):
        for name, command in (("cp", ["cp", "-r", str(source), str(copy)]), ("convert", convert)):
            shutil.rmtree(copy, ignore_errors=True)
            target.unlink(missing_ok=True)
            os.sync()
            runs[name].append(run_timed(command))
    pairs = zip(runs["convert"], runs["cp"], strict=True)
    shutil.rmtree(copy, ignore_errors=True)
    return {
        "weights_bytes": nbytes,
        "seconds": {name: [round(t.seconds, 3) for t in timings] for name, timings in runs.items()},
        "cpu_seconds": {name: [round(t.cpu_seconds, 3) for t in timings] for name, timings in runs.items()},
        "median_ratio_to_cp": round(median([ours.seconds / cp.seconds for ours, cp in pairs]), 3),
        "peak_mebibytes": round(max(t.peak_mebibytes for t in runs["convert"]), 1),
    }


def bench_quantise(rounds: int) -> dict[str, Any]:
    """BF16 bytes per second of one core: codes with and without counted losses, and gguf's quantisation to MXFP4.

    Seconds are those of the processor, so that what else runs on the machine does not count.
    """
    from gguf import GGMLQuantizationType, quants

    from megalith.format.mxfp4 import quantisation_loss, quantise_rows

    values = np.random.default_rng(2).standard_normal((4096, 2880), np.float32)
    bits = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    values = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    rows = 182  # about 1 MiB, as the converter reads

    def run(search: bool, losses: bool) -> None:
        for start in range(0, len(bits), rows):
            piece = bits[start : start + rows]
            found = quantise_rows(piece, "BF16", search)
            if losses:
                quantisation_loss(piece, "BF16", found)

    work: dict[str, tuple[int, Callable[[], object]]] = {
        "codes": (len(bits), lambda: run(False, False)),
        "codes and losses": (len(bits), lambda: run(False, True)),
        "codes and losses, scale search": (len(bits), lambda: run(True, True)),
        "gguf": (512, lambda: quants.quantize(values[:512], GGMLQuantizationType.MXFP4)),
    }
    result = {}
    for name, (count, step) in work.items():
        seconds = median(time_each(step, rounds, time.thread_time))
        result[f"{name}_mbytes_per_s"] = round(count * bits.shape[1] * 2 / seconds / 1e6, 1)
    return result


def hash_in_memory(jobs: int) -> float:
    """The hash library's own bytes per second over memory it has just seen, chunk by chunk, on `jobs` threads."""
    buffers = [memoryview(np.random.default_rng(i).bytes(64 << 20)) for i in range(jobs)]

    def work(data: memoryview) -> None:
        for at in range(0, len(data), CHUNK_BYTES):
            xxhash.xxh3_64_intdigest(data[at : at + CHUNK_BYTES])

    with ThreadPoolExecutor(jobs) as pool:
        begun = time.perf_counter()
        for _ in range(8):
            list(pool.map(work, buffers))
        return 8 * jobs * (64 << 20) / (time.perf_counter() - begun)


def bench_verify(folder: Path, rounds: int) -> dict[str, Any]:
    """`verify` inside one process against the hash library, by threads; and the whole command."""
    from megalith.format.verify import verify_checksums

    result: dict[str, Any] = {}
    with megalith.open(folder / "model.lith") as packed:
        for jobs in (1, 2):
            own, ours = [], []
            for _ in range(rounds):
                own.append(hash_in_memory(jobs))
                begun = time.perf_counter()
                if verify_checksums(packed, jobs):
                    raise SystemExit("verify found a broken chunk")
                ours.append(packed.file_bytes / (time.perf_counter() - begun))
            result[f"{jobs} threads"] = {
                "hash_library_gbytes_per_s": round(median(own) / 1e9, 2),
                "verify_gbytes_per_s": round(median(ours) / 1e9, 2),
                "median_ratio": round(median([a / b for a, b in zip(ours, own, strict=True)]), 3),
            }
    whole = [run_timed([*COMMAND, "verify", str(folder / "model.lith")]) for _ in range(rounds)]
    result["whole_command_seconds"] = round(median([t.seconds for t in whole]), 3)
    result["whole_command_peak_mebibytes"] = round(max(t.peak_mebibytes for t in whole), 1)
    return result


def bench_inspect(folder: Path, rounds: int) -> dict[str, Any]:
    """`inspect` of a file with 20,000 tensors, and of the large file, as whole commands."""
    config = llama_config(2222, 32, 32, 2, 1, 64)
    in_a_process(write_checkpoint, folder / "many", config, 1)
    run_timed([*COMMAND, "convert", str(folder / "many"), str(folder / "many.lith"), "--force"])
    with megalith.open(folder / "many.lith") as packed:
        tensors = len(packed.tensors)
    result: dict[str, Any] = {"tensors": tensors}
    for name in ("many.lith", "model.lith"):
        runs = [run_timed([*COMMAND, "inspect", str(folder / name)]) for _ in range(rounds)]
        result[f"{name}_seconds"] = round(median([t.seconds for t in runs]), 3)
    return result


def bench_start(rounds: int) -> dict[str, float]:
    """Import and help, as whole processes, beside an empty interpreter."""
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import megalith": [sys.executable, "-c", "import megalith"],
        "megalith --help": [*COMMAND, "--help"],
    }
    return {name: round(median([run_timed(c).seconds for _ in range(2 * rounds)]), 4) for name, c in commands.items()}


def bench_decode(demo: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds a token of greedy NumPy decoding, against sgemv over every matrix of the model."""
    engine = megalith.load(demo, backend="numpy")
    matrices = engine.backend.weights.matrices()
    inputs = [np.random.default_rng(0).standard_normal(w.shape[1], np.float32) for w in matrices]

    def sgemv() -> None:
        for w, x in zip(matrices, inputs, strict=True):
            w @ x

    passes, steps = [], []
    for _ in range(rounds):
        passes += time_each(sgemv, 8)
        times = [time.perf_counter()]
        for _ in engine.generate_tokens([504, 3575, 282, 4649, 314], max_tokens=17, ignore_eos=True):
            times.append(time.perf_counter())
        steps += np.diff(times)[1:].tolist()
    return {
        "decode_ms": round(1e3 * median(steps), 2),
        "sgemv_pass_ms": round(1e3 * median(passes), 2),
        "ratio": round(median(steps) / median(passes), 3),
    }


def time_each(work: Callable[[], object], count: int, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    seconds = []
    for _ in range(count):
        begun = clock()
        work()
        seconds.append(clock() - begun)
    return seconds


def versions() -> dict[str, str]:
    import importlib.metadata as metadata

    names = ("numpy", "xxhash", "zstandard", "safetensors")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=4.4)
    parser.add_argument("--demo", type=Path, default=Path("demo/smollm2.lith"))
    parser.add_argument("--only", nargs="*", help="some of: convert, verify, inspect, start, decode, quantise, 'mxfp4 repack'")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    benches: dict[str, Callable[[], Any]] = {
        "convert": lambda: bench_convert(folder, arguments.gigabytes, arguments.rounds),
        "verify": lambda: bench_verify(folder, arguments.rounds),
        "inspect": lambda: bench_inspect(folder, arguments.rounds),
        "mxfp4 repack": lambda: bench_mxfp4_repack(folder, arguments.rounds),
        "quantise": lambda: bench_quantise(arguments.rounds),
        "start": lambda: bench_start(arguments.rounds),
        "decode": lambda: bench_decode(arguments.demo, arguments.rounds),
    }
    report: dict[str, Any] = {
        "command": "python tools/bench_convert.py " + " ".join(sys.argv[1:]),
        "commit": commit.stdout.strip(),
        "processors": len(os.sched_getaffinity(0)),
        "versions": versions(),
        "results": {},
    }
    for name, bench in benches.items():
        if arguments.only and name not in arguments.only:
            continue
        report["results"][name] = bench()
        print(name, json.dumps(report["results"][name], indent=2), flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
