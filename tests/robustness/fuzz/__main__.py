"""Fuzz the readers, guided by coverage: `python -m fuzz --runs 10000 [TARGET ...]`.

Each target is one process of atheris (libFuzzer), for it ends with its process. What breaks a law
is kept in `fuzz-findings/`, and is read again by giving its path in place of a target's name.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FINDINGS = Path("fuzz-findings")
# What is followed line by line: ours, and two readers of archives. Tracing the parsers of
# YAML and of flags made them fifty times slower, and found little but themselves.
SEEN_INTO = ("mae_et", "finetune", "slurm", "tarfile", "zipfile")
WORDS = ("class_path", "init_args", "evil_module.Thing", "../", "!!python/name:", "config:", "&a",
         "*a", "<<:", "data.pkl", "weight_map", "steps", "1e999", "-1")  # fmt: skip


def main() -> int:
    """Run what the command line says; return 0 where every law held."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help="all by default")
    parser.add_argument("--runs", type=int, default=1000, help="inputs of each target")
    parser.add_argument("--seconds", type=int, default=0, help="of each target, at most")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    given = parser.parse_args()
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("fuzz: atheris is not installed: pip install '.[fuzz]'", file=sys.stderr)
        return 2
    if given.inside:
        _fuzz(given.inside, given.runs, given.seconds)
    from fuzz.targets import TARGETS

    failed, total = False, 0
    for name in given.targets or TARGETS:
        command = [sys.executable, "-m", "fuzz", f"--runs={given.runs}", f"--inside={name}"]
        began = time.monotonic()
        done = subprocess.run(
            [*command, f"--seconds={given.seconds}"], capture_output=True, text=True, check=False
        )
        found = re.findall(r"^(?:Done (\d+) runs|#(\d+)\t)", done.stderr, re.MULTILINE)
        runs = max((int(number) for pair in found for number in pair if number), default=0)
        edges = re.findall(r"\bcov: (\d+)", done.stderr)
        total += runs
        verdict = "held" if done.returncode == 0 else "BROKEN"
        taken = time.monotonic() - began
        seen = edges[-1] if edges else "?"
        print(f"{name}: {verdict}, {runs} inputs, {seen} edges, {taken:.0f} s", flush=True)
        if done.returncode:
            failed = True
            print(done.stderr[-4000:], file=sys.stderr)
    print(f"in all: {total} inputs")
    return int(failed)


def _fuzz(name: str, runs: int, seconds: int) -> None:
    """Fuzz one target; the process ends in it."""
    import atheris
    import torch  # noqa: F401

    with atheris.instrument_imports(include=list(SEEN_INTO)):
        from fuzz.targets import TARGETS
    import torch._weights_only_unpickler as unpickler

    from fuzz.watch import SECONDS, nothing_runs

    atheris.instrument_func(unpickler.Unpickler.load)
    target = TARGETS[name]
    FINDINGS.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    corpus = folder / "corpus"
    corpus.mkdir()
    for place, seed in enumerate(target.seeds()):
        (corpus / f"seed-{place}").write_bytes(seed)
    words = folder / "words"
    words.write_text("".join(f'"{word}"\n' for word in WORDS))
    place = folder / "files"

    def one(data: bytes) -> None:
        place.mkdir()
        try:
            with nothing_runs(folder):
                target.read(data, place)
        finally:
            shutil.rmtree(place)

    longest = max(map(len, target.seeds())) * 2
    atheris.Setup(
        [sys.argv[0], f"-runs={runs}", f"-max_total_time={seconds}", f"-max_len={longest}",
         f"-dict={words}", f"-artifact_prefix={FINDINGS}/{name}-", f"-timeout={SECONDS}",
         "-rss_limit_mb=8192", "-seed=1", str(corpus)],
        one,
    )  # fmt: skip
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
