"""The package stands alone, and does what its README shows."""

import ast
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
TWICE = """
.version 9.0
.target sm_90
.address_size 64
.visible .entry twice(.param .u64 x)
{
.reg .b32 %r<5>; .reg .f32 %f<3>; .reg .b64 %rd<4>;
ld.param.u64 %rd1, [x];
mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x;
shl.b32 %r3, %r2, 6; add.s32 %r4, %r3, %r1;
mul.wide.u32 %rd2, %r4, 4; add.s64 %rd3, %rd1, %rd2;
ld.global.f32 %f1, [%rd3]; add.f32 %f2, %f1, %f1; st.global.f32 [%rd3], %f2;
ret;
}
"""


def imported(path: Path) -> set[str]:
    """The packages that a file imports, but for its own."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level != 1:
            found.add("." * node.level + (node.module or "").split(".")[0])
    return found


def test_it_knows_nothing_of_what_it_is_used_for():
    allowed = {"numpy", "ml_dtypes"} | sys.stdlib_module_names
    for path in HERE.glob("*.py"):
        beside = {"hypothesis", "pytest"} if path.name.startswith("test_") else set()
        assert imported(path) <= allowed | beside, path


def test_readme(capsys):
    text = (HERE / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(example.splitlines()) <= 15
    exec(example, {"ptx": TWICE})
    printed = capsys.readouterr().out
    assert printed.startswith("[  0.   2.   4.")
    assert printed.endswith(" 254.]\n16\n")
