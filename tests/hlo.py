"""Reading compiled programs: calls, aliases, copies and collectives."""

import re

TARGET = "jax_gdn.decode.v2"
DEFERRED_TARGET = "jax_gdn.decode_deferred.v1"


def calls(text: str, target: str = TARGET) -> int:
    """Counts the native calls in compiled HLO."""
    return text.count(f'custom_call_target="{target}"')


def state_aliases(text: str) -> int:
    """Counts the native calls whose second result is their fourth operand."""
    return len(
        re.findall(r"output_to_operand_aliasing=\{[^}]*\{1\}: \(3, \{\}\)", text)
    )


def copies(text: str, shape: tuple[int, ...], dtype: str = "f32") -> int:
    """Counts copies of arrays of a shape, plain and fused."""
    array = rf"{dtype}\[{','.join(map(str, shape))}\]"
    plain = re.findall(rf"= {array}\S* copy(?:-start)?\(", text)
    # By its own name or that of what it calls; an operand may be some small copy.
    fusion = rf"(\S+) = {array}\S* fusion\([^\n]*calls=(\S+)"
    fused = [names for names in re.findall(fusion, text) if "copy" in "".join(names)]
    return len(plain) + len(fused)


def collectives(text: str) -> list[str]:
    """Lists the operations by which devices wait for each other, sorted."""
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return sorted(re.findall(rf" ({names})(?:-start)?\(", text))


def opcodes(text: str) -> set[str]:
    """Returns the operations outside fused computations."""
    bodies = re.findall(r"^(?:ENTRY )?%(\S+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S)
    found: set[str] = set()
    for name, body in bodies:
        if not name.startswith(("fused_", "wrapped_")):
            found.update(re.findall(r"= (?:\([^=]*?\)|\S+) ([\w-]+)\(", body))
    return found
