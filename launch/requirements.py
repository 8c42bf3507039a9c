"""What setup.py asks for, and what of it is missing: here, or in a folder of wheels.

    python launch/requirements.py missing [--extras test,gpu] [--wheels DIR] [--any_version]
                                          [--installed_here DIR]
    python launch/requirements.py wheels --wheels DIR [--extras test] [--any_version]
    python launch/requirements.py fetch --wheels DIR [--extras test] [--python 3.12]
                                        [--torch present|cpu|default] [--present FILE]
    python launch/requirements.py torch [--wheels DIR --any_version]

`missing` prints a line for each requirement that this interpreter does not meet, and for each that
those have in turn if a folder of wheels is to meet them; exit status 1 if there is any. With
`--any_version` a package that is there in another version, and that no wheel replaces, is not
missing. With `--installed_here` this package itself must be importable from DIR, wherever the
caller stands. `wheels` prints the files to install, and warns of other versions.
`fetch` downloads wheels until nothing is missing for that Python on Linux. `torch` prints the
folder of a torch in setup.py's range, if this interpreter has one, and its CUDA version; with
`--any_version` that of any torch, unless the folder has one.

Needs nothing but `packaging`, or the one in pip: it is run before anything is installed.
"""

import argparse
import ast
import importlib.util
import platform
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

try:
    from packaging import markers, tags, utils
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging import markers, tags, utils  # type: ignore[no-redef]
    from pip._vendor.packaging.requirements import Requirement  # type: ignore[no-redef]

REPOSITORY = Path(__file__).resolve().parent.parent
# What a machine with torch has: torch, and what it requires.
TORCH_FAMILY = re.compile(
    r"torch|triton|nvidia-.*|cuda-.*|numpy|sympy|mpmath|networkx|jinja2|markupsafe|fsspec|filelock"
    r"|typing-extensions"
)
PYTHONS = ((3, 10), (3, 12))  # setup.py's python_requires
GLIBC = 28  # 2.28, which torch's own wheels need


class Asked(NamedTuple):
    """A requirement, and the package that has it."""

    requirement: Requirement
    by: str


class Target(NamedTuple):
    """The Python that will run."""

    environment: Mapping[str, str]
    """Of markers"""
    tags: frozenset
    """Of wheels"""

    @classmethod
    def here(cls) -> "Target":
        return cls(markers.default_environment(), frozenset(tags.sys_tags()))

    @classmethod
    def of(cls, python: str) -> "Target":
        """CPython `python` ("3.12") on Linux, on this processor."""
        major, minor = map(int, python.split("."))
        version, platforms = (major, minor), platforms_of(platform.machine())
        environment = markers.default_environment() | {
            "python_version": python,
            "python_full_version": f"{python}.0",
            "implementation_version": f"{python}.0",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "os_name": "posix",
        }
        found = [*tags.cpython_tags(version, platforms=platforms)]
        found += tags.compatible_tags(version, f"cp{major}{minor}", platforms)
        return cls(environment, frozenset(found))


def platforms_of(machine: str) -> list[str]:
    """Platform tags of wheels for Linux with glibc 2.28."""
    return [
        *(f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC, 4, -1)),
        *(f"manylinux{year}_{machine}" for year in ("2014", "2010", "1")),
        f"linux_{machine}",
    ]


def declared(extras: Iterable[str]) -> list[Asked]:
    """Dependencies of setup.py, with those of `extras`. Raises ValueError for an unknown one."""
    tree = ast.parse((REPOSITORY / "setup.py").read_text(encoding="utf-8"))
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    known = values["EXTRAS"]
    for extra in extras:
        if extra not in known:
            raise ValueError(f"no extra {extra!r} in setup.py; it has {', '.join(known)}")
    lines = [*values["DEPENDENCIES"], *(line for extra in extras for line in known[extra])]
    return [Asked(Requirement(line), "megatron_gkd") for line in lines]


def torch_version() -> str:
    """The version that set-up installs where there is none."""
    return re.findall(r'^TORCH = "(.+)"', (REPOSITORY / "setup.py").read_text(), re.M)[0]


def installed() -> dict[str, str]:
    """Name -> version of what this interpreter has."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # the first on the path is the one that is imported
            found.setdefault(utils.canonicalize_name(name), distribution.version)
    return found


def listed(file: Path) -> dict[str, str]:
    """The same from a file of `name==version` lines, as `pip list --format=freeze` prints them."""
    pairs = (line.strip().split("==") for line in file.read_text().splitlines() if "==" in line)
    return {utils.canonicalize_name(name): version for name, version in pairs}


def wheels_in(folder: Path, target: Target) -> dict[str, list[tuple]]:
    """Name -> [(version, file)] of the wheels that the target can use, the newest first."""
    found: dict[str, list[tuple]] = {}
    for file in folder.glob("*.whl"):
        name, version, _, of_wheel = utils.parse_wheel_filename(file.name)
        if of_wheel & target.tags:
            found.setdefault(name, []).append((version, file))
    return {name: sorted(files, reverse=True) for name, files in found.items()}


def requirements_of(wheel: Path) -> list[Requirement]:
    """What a wheel's metadata require, with their markers."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        text = archive.read(name).decode("utf-8")
    return [
        Requirement(line) for line in HeaderParser().parsestr(text).get_all("Requires-Dist", [])
    ]


def applies(requirement: Requirement, extras: Iterable[str], target: Target) -> bool:
    """Whether a package that is asked for with `extras` needs it there."""
    if requirement.marker is None:
        return True
    environments = ({**target.environment, "extra": extra} for extra in ["", *extras])
    return any(requirement.marker.evaluate(environment) for environment in environments)


class Plan(NamedTuple):
    """What becomes of requirements, and of those of the wheels that meet them."""

    absent: list[Asked]
    """Neither there nor among the wheels"""
    other: list[Asked]
    """There in another version, which no wheel replaces"""
    wheels: list[Path]
    """To be installed"""


def plan(
    roots: Sequence[Asked],
    present: Mapping[str, str],
    target: Target,
    folder: Path | None,
    assumed: re.Pattern | None = None,
) -> Plan:
    """How `present` (name -> version) and the wheels of `folder` meet `roots`; of wheels that fit
    the newest. Names that `assumed` matches are there.
    """
    wheels = wheels_in(folder, target) if folder else {}
    waiting, seen, found = list(roots), set(), Plan([], [], [])
    while waiting:
        asked = waiting.pop(0)
        requirement, name = asked.requirement, utils.canonicalize_name(asked.requirement.name)
        key = (name, frozenset(requirement.extras), str(requirement.specifier))
        if key in seen:
            continue
        seen.add(key)
        if name in present:
            if requirement.specifier.contains(present[name], prereleases=True):
                continue
        elif assumed and assumed.fullmatch(name):
            continue
        fitting = (
            file
            for version, file in wheels.get(name, [])
            if requirement.specifier.contains(version, prereleases=True)
        )
        wheel = next(fitting, None)
        if wheel is None:
            (found.other if name in present else found.absent).append(asked)
            continue
        if wheel not in found.wheels:
            found.wheels.append(wheel)
        for required in requirements_of(wheel):
            if applies(required, requirement.extras, target):
                waiting.append(Asked(required, name))
    return found


def by_name(absent: Iterable[Asked]) -> dict[str, str]:
    """What pip is to find for each name, with all that is asked of it -> for whom."""
    found: dict[str, tuple[set[str], set[str], list[str]]] = {}
    for requirement, by in absent:
        name = utils.canonicalize_name(requirement.name)
        extras, specifiers, askers = found.setdefault(name, (set(), set(), []))
        extras |= requirement.extras
        specifiers |= set(str(requirement.specifier).split(",")) - {""}
        askers.append(by)
    lines = {}
    for name, (extras, specifiers, askers) in found.items():
        options = f"[{','.join(sorted(extras))}]" if extras else ""
        lines[f"{name}{options}{','.join(sorted(specifiers))}"] = ", ".join(dict.fromkeys(askers))
    return lines


def fetch(
    roots: list[Asked],
    present: Mapping[str, str],
    python: str,
    folder: Path,
    assumed: re.Pattern | None,
) -> None:
    """Download wheels into `folder` until nothing is missing for `python`. Exits with status 1 and
    their names where some cannot be had.
    """
    target, machine = Target.of(python), platform.machine()
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
    pip += ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    pip += ["--implementation", "cp", "--python-version", python]
    pip += [word for name in platforms_of(machine) for word in ("--platform", name)]

    def download(lines: Sequence[str]) -> bool:
        cpu_build = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
        more = cpu_build if any("+cpu" in line for line in lines) else []
        return subprocess.run([*pip, *more, *lines]).returncode == 0

    before: list[str] = []
    while True:
        found = plan(roots, present, target, folder, assumed)
        lines = list(by_name([*found.absent, *found.other]))
        if not lines:
            return
        print(f"{len(lines)} wheels: {' '.join(re.split('[<>=!~[]', one)[0] for one in lines)}")
        # one after the other to name those that cannot be had
        without = [] if download(lines) else [line for line in lines if not download([line])]
        if lines == before or without:
            names = "\n  ".join(without or lines)
            sys.exit(f"fetch_wheels: error: no wheel for Python {python} on Linux of\n  {names}")
        before = lines


def print_torch(any_version: bool) -> None:
    """ "FOLDER CUDA" of a torch in range (or any) that this interpreter imports; status 1 without
    one.
    """
    (asked,) = (one for one in declared([]) if one.requirement.name == "torch")
    import torch

    version = torch.__version__.split("+")[0]
    if not any_version and not asked.requirement.specifier.contains(version, prereleases=True):
        sys.exit(1)
    print(Path(torch.__file__).resolve().parent.parent, torch.version.cuda or "cpu")


def package_is_from(folder: str) -> bool:
    """Whether `import megatron_gkd` finds the one in `folder`; call it with `python -I`."""
    spec = importlib.util.find_spec("megatron_gkd")
    return bool(spec and spec.origin and Path(spec.origin).parent.parent == Path(folder).resolve())


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=("missing", "wheels", "fetch", "torch"))
    add("--extras", default="", help="of setup.py")
    add("--wheels", type=Path, metavar="DIR")
    add("--any_version", action="store_true")
    add("--installed_here", metavar="DIR")
    add("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}")
    add("--torch", default="default", choices=("present", "cpu", "default"))
    add("--present", type=Path, metavar="FILE", help="pip list --format=freeze, of that machine")
    arguments = parser.parse_args(argv)
    if arguments.what in ("wheels", "fetch") and not arguments.wheels:
        parser.error(f"{arguments.what} needs --wheels DIR")
    if arguments.what != "fetch" and arguments.wheels and not arguments.wheels.is_dir():
        parser.error(f"--wheels {arguments.wheels}: no such folder")
    if arguments.what == "torch":
        has_other = arguments.wheels and "torch" in wheels_in(arguments.wheels, Target.here())
        return print_torch(arguments.any_version and not has_other)
    try:
        roots = declared([extra for extra in arguments.extras.split(",") if extra])
    except ValueError as error:
        parser.error(str(error))
    if arguments.what != "fetch":
        here = installed()
        found = plan(roots, here, Target.here(), arguments.wheels)
        if arguments.what == "wheels":
            for asked, by in found.other:
                there = here[utils.canonicalize_name(asked.name)]
                print(
                    f"{asked.name} {there} is used; {by} asks for {asked.specifier}",
                    file=sys.stderr,
                )
            print(*found.wheels, sep="\n", end="\n" if found.wheels else "")
            return
        lines = [] if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1] else ["Python 3.10 to 3.12"]
        absent = [*found.absent, *([] if arguments.any_version else found.other)]
        lines += [f"{line} (for {askers})" for line, askers in by_name(absent).items()]
        if arguments.installed_here and not package_is_from(arguments.installed_here):
            lines.append(f"megatron_gkd itself, from {arguments.installed_here}")
        print(*lines, sep="\n", end="\n" if lines else "")
        sys.exit(1 if lines else 0)
    present = listed(arguments.present) if arguments.present else {}
    roots.append(Asked(Requirement("pip"), "the installation"))
    assumed = TORCH_FAMILY if arguments.torch == "present" else None
    if assumed is None and "torch" not in present:
        build = "+cpu" if arguments.torch == "cpu" else ""
        roots.insert(0, Asked(Requirement(f"torch=={torch_version()}{build}"), "megatron_gkd"))
    fetch(roots, present, arguments.python, arguments.wheels, assumed)


if __name__ == "__main__":
    main(sys.argv[1:])
