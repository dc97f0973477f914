"""The architecture: import directions, cost of an import, names, unused code."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import torch
import vulture

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sammed3d_backbone"
SOURCES = sorted(PACKAGE.rglob("*.py"))
EVERYTHING = sorted(
    path
    for folder in ("sammed3d_backbone", "recipes", "examples", "tests", "weights")
    for path in (ROOT / folder).rglob("*.py")
)

PAGES = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*.md"))]

# What only users call; the README or a docstring names it.
PUBLIC = {
    "register_backbones",  # for MONAI's FlexibleUNet
    "expanding_head",  # by name, in adapters/registry.py
    "linear_head",  # by name, in adapters/registry.py
    "num_features",  # for timm
    "mask_prompt",  # a mask to begin with
    "invert",  # Geometry's way back for values other than labels
    "initialize_from_trained_model_folder",  # scripts written for nnInteractive call it
    *("on_train_epoch_start", "on_train_epoch_end", "on_epoch_end"),  # nnU-Net's loop calls them
}

# A part is a module or a folder directly inside the package. It may import itself and these parts;
# a dotted name stands for one module of a part.
MAY_IMPORT = {
    "models": set(),
    "config": {"console", "files"},
    "console": set(),
    "files": set(),
    "parallel": set(),
    "provenance": set(),
    "data": {"config", "console", "files"},
    "strategies": {"data.geometry", "data.regions"},
    "adapters": {
        "loading",
        "models.high_resolution",
        "models.layers",
        "models.mask_decoder",
        "models.prompt_encoder",
    },
    "loading": {"data.preprocessing", "files", "models"},
    "selftest": {"models", "loading.variants"},
    "evaluation": {"console", "data", "files"},
    "curation": {"console", "data", "evaluation", "files", "parallel"},
    "clickbench": {"console", "data", "evaluation", "files", "provenance", "strategies"},
    "inference": {
        "adapters",
        "console",
        "data",
        "evaluation.metrics",
        "files",
        "loading",
        "models.image_encoder",
        "models.sam",
        "parallel",
        "provenance",
    },
    "serving": {"__init__", "data", "inference"},
    "training": {
        "adapters",
        "config",
        "data",
        "evaluation",
        "files",
        "inference",
        "loading",
        "provenance",
    },
    "planning": {
        "console",
        "curation.sides",
        "data",
        "evaluation",
        "loading.registry",
        "loading.variants",
    },
    "pretraining": {"data", "files", "models", "strategies", "training"},
}
MAY_IMPORT["__init__"] = {"adapters", "data.volume", "inference", "loading"}
MAY_IMPORT["cli"] = {*MAY_IMPORT, "__init__"}

HEAVY = {
    "accelerate",
    "distributed",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "monai",
    "nibabel",
    "peft",
    "pydantic",
    "scipy",
    "sklearn",
    "timm",
    "torchvision",
    "transformers",
}


def name_of(path):
    """The dotted name of a source file of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module):
    """The part that a dotted name belongs to; the package itself is `__init__`."""
    return [*module.split("."), "__init__"][1]


MODULES = {name_of(path): path for path in SOURCES}


def imports_of(module):
    """Dotted names that a module imports, at its top or inside its functions."""
    found = set()
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            stem = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{stem}.{alias.name}"
                found.add(inner if inner in MODULES else stem)
    return found


def own_imports_of(module):
    """The imports that stay inside the package, without the module itself."""
    return {name for name in imports_of(module) if name in MODULES} - {module}


def test_imports_follow_the_arrows():
    wrong = []
    for module in MODULES:
        part = part_of(module)
        assert part in MAY_IMPORT, f"{module} is a new part: say in MAY_IMPORT what it may import"
        allowed = {part, *MAY_IMPORT[part]}
        wrong += [
            f"{module} imports {name}; {part} may import {sorted(MAY_IMPORT[part])}"
            for name in own_imports_of(module)
            if part_of(name) not in allowed
            and name.removeprefix("sammed3d_backbone.") not in allowed
        ]
    assert not wrong, "\n".join(wrong)


def test_no_arrow_is_drawn_that_no_import_needs():
    needed = {part: set() for part in MAY_IMPORT}
    for module in MODULES:
        for name in own_imports_of(module):
            needed[part_of(module)] |= {part_of(name), name.removeprefix("sammed3d_backbone.")}
    unused = {part: MAY_IMPORT[part] - needed[part] for part in MAY_IMPORT if part != "cli"}
    assert not {part: names for part, names in unused.items() if names}


def test_the_package_runs_without_the_rest_of_the_checkout():
    for module in MODULES:
        outside = {name.split(".")[0] for name in imports_of(module)}
        assert not outside & {"recipes", "tests", "examples", "weights"}, module


def test_no_import_goes_round_in_a_circle():
    # A parent package is not drawn: Python runs it before its children in any case.
    graph = {
        module: {name for name in own_imports_of(module) if not module.startswith(f"{name}.")}
        for module in MODULES
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_importing_the_package_loads_no_heavy_library():
    code = "import sys, sammed3d_backbone; print(*sorted({n.split('.')[0] for n in sys.modules}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not HEAVY & set(run.stdout.split())


def test_every_module_says_what_it_is():
    silent = [p for p in SOURCES if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))]
    assert not silent


def test_no_public_name_is_defined_twice():
    places = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                places.setdefault(node.name, []).append(module)
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_no_module_is_a_drawer():
    drawers = {"utils", "util", "common", "helpers", "misc"}
    assert not [name for name in MODULES if drawers & set(name.split("."))]


def test_pickles_are_read_in_one_place_and_never_run():
    for path in EVERYTHING:
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads")
        ]
        assert not calls or path == PACKAGE / "loading/checkpoint.py", path
        for call in calls:
            keywords = {(k.arg, ast.unparse(k.value)) for k in call.keywords}
            assert ("weights_only", "True") in keywords, path


def test_nothing_in_the_package_or_the_recipes_is_unused():
    # A use is a call in the package, the recipes, the examples or a page; a test is none.
    finder = vulture.Vulture()
    finder.scavenge([path for path in EVERYTHING if not path.is_relative_to(ROOT / "tests")])
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S):
            finder.scan(block, filename=page)
    # What these classes name is called by torch, like forward.
    known = {*dir(torch.nn.Module), *dir(torch.autograd.Function), *PUBLIC}
    code = {"class", "function", "method", "property"}  # ruff finds unused imports and locals
    # A recipe's variables are its knobs; the package's are also records that are shown whole.
    kinds = {PACKAGE: code, ROOT / "recipes": {*code, "variable"}}
    dead = [
        f"{item.filename.relative_to(ROOT)}:{item.first_lineno} {item.typ} {item.name}"
        for item in finder.get_unused_code()
        for folder, kind in kinds.items()
        if item.filename.is_relative_to(folder) and item.typ in kind and item.name not in known
    ]
    assert not dead, "delete or use:\n" + "\n".join(dead)
