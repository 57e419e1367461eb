#!/usr/bin/env python3
"""Recomputes `unisono digest` from a checkpoint's files, sharing no code with it.

    python3 scripts/digest.py runs/tiny-001                      # the newest checkpoint of a run
    python3 scripts/digest.py runs/tiny-001/checkpoints/step-00000100

Needs the standard library only; with the `blake3` module it is fast, without it (or with --pure) BLAKE3 is computed
here, at some hundred kB/s.
"""

import argparse
import json
import struct
import sys
from pathlib import Path

IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8
MASK = 0xFFFFFFFF


def compress(chaining, words, counter, length, flags):
    """BLAKE3's compression function, after section 2.2 of its specification; the first eight words of the result."""
    v = [*chaining, *IV[:4], counter & MASK, counter >> 32, length, flags]
    m = list(words)
    for turn in range(7):
        for i, (a, b, c, d) in enumerate(
            ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
             (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
        ):
            va, vb, vc, vd = v[a], v[b], v[c], v[d]
            va = (va + vb + m[2 * i]) & MASK
            vd ^= va
            vd = (vd >> 16 | vd << 16) & MASK
            vc = (vc + vd) & MASK
            vb ^= vc
            vb = (vb >> 12 | vb << 20) & MASK
            va = (va + vb + m[2 * i + 1]) & MASK
            vd ^= va
            vd = (vd >> 8 | vd << 24) & MASK
            vc = (vc + vd) & MASK
            vb ^= vc
            vb = (vb >> 7 | vb << 25) & MASK
            v[a], v[b], v[c], v[d] = va, vb, vc, vd
        m = [m[p] for p in PERMUTATION]
    return [v[i] ^ v[i + 8] for i in range(8)]


class Blake3:
    """BLAKE3 (hash mode, 32 bytes) in plain Python."""

    def __init__(self):
        self.stack = []  # chaining values of complete subtrees, largest first
        self.chunks = 0  # chunks complete and pushed
        self.buffer = bytearray()

    def update(self, data):
        self.buffer += data
        # The last chunk waits: whether it is the root is known at the end only.
        begin = 0
        while len(self.buffer) - begin > 1024:
            value = self.chunk(self.buffer[begin:begin + 1024], self.chunks, 0)
            begin += 1024
            self.chunks += 1
            total = self.chunks
            while total % 2 == 0:
                value = compress(IV, self.stack.pop() + value, 0, 64, PARENT)
                total //= 2
            self.stack.append(value)
        del self.buffer[:begin]

    @staticmethod
    def chunk(data, counter, root):
        value = list(IV)
        blocks = max(1, -(-len(data) // 64))
        for i in range(blocks):
            block = bytes(data[64 * i:64 * i + 64])
            flags = (CHUNK_START if i == 0 else 0) | ((CHUNK_END | root) if i == blocks - 1 else 0)
            words = struct.unpack("<16I", block.ljust(64, b"\0"))
            value = compress(value, words, counter, len(block), flags)
        return value

    def hexdigest(self):
        value = self.chunk(self.buffer, self.chunks, 0 if self.stack else ROOT)
        for depth in range(len(self.stack) - 1, -1, -1):
            value = compress(IV, self.stack[depth] + value, 0, 64, PARENT | (0 if depth else ROOT))
        return struct.pack("<8I", *value).hex()


def hasher(pure):
    if not pure:
        try:
            import blake3
            return blake3.blake3()
        except ImportError:
            pass
    return Blake3()


def blocks(path, begin, end):
    with open(path, "rb") as file:
        file.seek(begin)
        while begin < end:
            block = file.read(min(1 << 20, end - begin))
            if not block:
                sys.exit(f"{path}: ends early")
            begin += len(block)
            yield block


def header(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return 8 + length, json.loads(file.read(length))


def find(argument):
    directory = Path(argument)
    if not (directory / "MANIFEST.json").exists():
        found = sorted(p.parent for p in directory.glob("checkpoints/step-*/MANIFEST.json"))
        if not found:
            sys.exit(f"{directory}: neither a checkpoint nor a run with one")
        directory = found[-1]
    return directory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="a run's directory or a checkpoint's")
    parser.add_argument("--pure", action="store_true", help="do not use the blake3 module")
    options = parser.parse_args()
    directory = find(options.path)
    manifest = json.loads((directory / "MANIFEST.json").read_text())

    ranges, samples = {}, None
    dtypes = {t["name"]: t.get("dtype", "F32") for t in manifest["tensors"]}
    for file in manifest["files"]:
        path = directory / file["name"]
        check = hasher(options.pure)
        for block in blocks(path, 0, path.stat().st_size):
            check.update(block)
        if check.hexdigest() != file["blake3"]:
            sys.exit(f"{path}: does not have the hash that the manifest gives")
        data, tensors = header(path)
        if file["kind"] == "samples":
            samples = (path, *(data + offset for offset in tensors["samples"]["data_offsets"]))
        for r in file.get("ranges", []):
            parts = []
            for part in ("master", "m", "v"):
                entry = tensors[f"{r['tensor']}/{part}/{r['begin']}-{r['end']}"]
                assert entry["dtype"] == dtypes[r["tensor"]], entry
                parts.append((path, *(data + offset for offset in entry["data_offsets"])))
            ranges.setdefault(r["tensor"], []).append((r["begin"], r["end"], parts))

    result = hasher(options.pure)
    for tensor in sorted(manifest["tensors"], key=lambda t: t["name"].encode()):
        count = 1
        for n in tensor["shape"]:
            count *= n
        held = sorted(ranges.pop(tensor["name"], []), key=lambda r: r[0])
        edges = [0] + [end for _, end, _ in held]
        if [begin for begin, _, _ in held] != edges[:-1] or edges[-1] != count:
            sys.exit(f"{tensor['name']}: ranges do not tile {count} elements")
        result.update(tensor["name"].encode() + b"\0")
        for part in range(3):
            for _, _, parts in held:
                for block in blocks(*parts[part]):
                    result.update(block)
    if ranges:
        sys.exit(f"tensors that the manifest does not list: {sorted(ranges)}")
    cursor = manifest["cursor"]
    result.update(struct.pack("<3Q", cursor["step"], cursor["epoch"], cursor["position"]))
    if samples:
        for block in blocks(*samples):
            result.update(block)
    print(result.hexdigest())


if __name__ == "__main__":
    main()
