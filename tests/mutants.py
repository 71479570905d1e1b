"""Does the suite catch bugs?  python tests/mutants.py [WORD ...] [--jobs=2] [--clean] [--verbose]

Every entry of mutants.txt is a bug of one line. Each is planted in a copy of the repository, and its tests run until
one fails: then the bug is caught. Words choose entries whose file or text holds one of them. Prints the bugs that
survive, and how many are caught. Status 1 if one survives that is not marked as known, or if the code that an entry
changes is not there any more. --clean plants nothing: then all tests must pass. --verbose prints every entry's result.

An entry of mutants.txt is a block of lines, ended by an empty one:

    file: train.py                    the file that the bug is planted in
    tests: tests/test_train.py -k lr  what to run, as pytest's arguments
    env: TRITON_INTERPRET=1           optional
    why: the last step repeats        what goes wrong
    -return cfg.lr * step             a line or a part of one, as it is; it must stand in the file exactly once
    +return cfg.lr * (step - 1)       as the bug has it
    known: why no test catches it     optional
"""
import contextlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 180  # seconds; a bug that makes its tests hang, or kills them, is caught
LEFT_OUT = shutil.ignore_patterns(".git", "out", "data", "wandb", "*.bin", "*.pt")


def read_mutants(path):
    """[{file, tests, env, why, known, old, new}] from mutants.txt."""
    mutants = []
    for block in path.read_text().strip().split("\n\n"):
        lines = [line for line in block.split("\n") if not line.startswith("#")]
        fields = dict(line.split(": ", 1) for line in lines if line[:1] not in "+-")
        old, new = ("\n".join(line[1:] for line in lines if line.startswith(sign)) for sign in "-+")
        if lines:
            mutants.append({"env": "", "known": "", **fields, "old": old, "new": new})
    return mutants


def is_stale(mutant):
    return (ROOT / mutant["file"]).read_text().count(mutant["old"]) != 1


def plant(mutant, folder):
    """Puts the bug into the copy of the repository."""
    path = Path(folder) / mutant["file"]
    path.write_text(path.read_text().replace(mutant["old"], mutant["new"]))


def run_tests(mutant, folder):
    """Ends this forked process with pytest's status."""
    status = 3
    try:
        os.setsid()
        signal.alarm(TIMEOUT)
        log = os.open(os.path.join(folder, "log"), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2)
        os.chdir(folder)
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *shlex.split(mutant["tests"])]
        if mutant["env"]:  # which modules may have read when they were loaded
            os.environ.update(pair.split("=", 1) for pair in mutant["env"].split())
            os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])
        sys.path[0], sys.argv = folder, ["pytest"]
        status = int(pytest.main(arguments))
    finally:
        sys.stdout.flush()
        os._exit(status)


def run_all(mutants, jobs, clean, verbose):
    """Yields (mutant, whether a test fails with it)."""
    todo, running = list(mutants), {}
    while todo or running:
        if todo and len(running) < jobs:
            mutant, folder = todo.pop(0), tempfile.mkdtemp()
            shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=LEFT_OUT)
            if not clean:
                plant(mutant, folder)
            child = os.fork()
            if not child:
                run_tests(mutant, folder)
            running[child] = mutant, folder, time.monotonic()
            continue
        child, status = os.wait()
        mutant, folder, began = running.pop(child)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what the tests have started and left
        code = os.waitstatus_to_exitcode(status)
        log = Path(folder, "log").read_text(errors="replace")
        if verbose:
            what = mutant["tests"] if clean else f"{mutant['file']}: {mutant['why']}"
            print(f"{time.monotonic() - began:5.1f} s  {'failed' if code else 'passed'}  {what}", flush=True)
            for line in log.splitlines():
                if line.startswith(("FAILED", "ERROR")):
                    print(f"         {line}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        assert code <= 2, f"pytest ended with {code}: {mutant['tests']}\n{log[-2000:]}"
        yield mutant, code != 0


def main(words, jobs=2, clean=False, verbose=False):
    mutants = [m for m in read_mutants(Path(__file__).with_suffix(".txt"))
               if not words or any(word in m["file"] + m["why"] + m["old"] for word in words)]
    if clean:
        mutants = list({(m["tests"], m["env"]): m for m in mutants}.values())
        failing = [m for m, failed in run_all(mutants, jobs, clean, verbose) if failed]
        for m in failing:
            print(f"fails without a bug: {m['tests']}")
        print(f"{len(mutants) - len(failing)} of {len(mutants)} selections of tests pass without a bug")
        return bool(failing)
    stale = [m for m in mutants if is_stale(m)]
    results = list(run_all([m for m in mutants if m not in stale], jobs, clean, verbose))
    survivors = [m for m, failed in results if not failed]
    for m in stale:
        print(f"stale, the code has changed: {m['file']}: {m['why']}\n  - {m['old']}")
    for m in survivors:
        known = f" (known: {m['known']})" if m["known"] else ""
        print(f"survives: {m['file']}: {m['why']}{known}\n  - {m['old']}\n  + {m['new']}")
    print(f"{len(results) - len(survivors)} of {len(mutants)} bugs are caught")
    return bool(stale) or any(not m["known"] for m in survivors)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch loads
    # loaded here once: importing them takes longer than most tests
    import functorch.compile  # noqa: F401
    import numpy  # noqa: F401
    import pytest
    given = dict(arg.removeprefix("--").partition("=")[::2] for arg in sys.argv[1:] if arg.startswith("--"))
    words = [arg for arg in sys.argv[1:] if not arg.startswith("--")]
    sys.exit(main(words, int(given.get("jobs", 2)), "clean" in given, "verbose" in given))
