"""What an adapter does to one module: the formulas of LoRA and its relatives, a row for each form.

W is a kernel in PyTorch's layout, [out, in] or [out, in, kh, kw]; an adapter of strength s makes W' = W + s D. Names of
tensors are those of LyCORIS, without endings:

    lora   D = k up down; with lora_mid, k up mid down (Tucker)     Hu et al. 2021, eq. 3; Yeh et al. 2023, section 3.3
    loha   D = k (w1_a w1_b) * (w2_a w2_b), elementwise             Hyeon-Woo et al. 2021, eq. 1
    lokr   D = k kron(w1, w2), either of them w_a w_b               Yeh et al. 2023, eq. 5
    ia3    D = W * weight, over rows, or over columns (on_input)    Liu et al. 2022, eq. 3
    full   D = diff                                                 norm: the same of a norm's scale and bias
    oft    D = R W - W, R = (I + Q)(I - Q)^-1, Q = B - B^T          Qiu et al. 2023, section 4.1
    glora  D = k (b1 b2 + W a1 a2)                                  Chavan et al. 2023, eq. 9

k = alpha / r, and 1 without alpha. With dora_scale m any of the first three is normalised: W' = m V / |V|, V = W + D
(Liu et al. 2024, eq. 5), by rows or by columns as the shape of m says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Path = tuple[str, ...]  # of a leaf in the whole parameters
Tensors = Mapping[str, np.ndarray]
Factors = tuple[np.ndarray, np.ndarray]

EXPANDED = 64
"""Most ranks that a product of two low-rank matrices may have to count as one of low rank."""


@dataclass(frozen=True, eq=False)
class Update:
    """What an adapter does to one module.

    form: one of `FORMS`.
    tensors: as they are in the file, by their names without endings.
    shape: of W, in PyTorch's layout.
    kernel: the leaf that W is (of a norm, its scale), and kernel_shape: that leaf's shape.
    bias: the leaf of its bias; None without.
    scale: k, where the file says it by other means than alpha.
    """

    form: str
    tensors: Tensors
    shape: tuple[int, ...]
    kernel: Path
    kernel_shape: tuple[int, ...]
    bias: Path | None = None
    scale: float | None = None

    @property
    def rank(self) -> int | None:
        """The rank that alpha is divided by; None for forms without."""
        return FORMS[self.form].rank(self.tensors)

    @property
    def k(self) -> float:
        """What the product of the factors is multiplied by."""
        if self.scale is not None:
            return self.scale
        if "alpha" not in self.tensors or self.rank is None:
            return 1.0
        return float(np.asarray(self.tensors["alpha"], np.float64).reshape(-1)[0]) / self.rank

    @property
    def is_dora(self) -> bool:
        return "dora_scale" in self.tensors

    def change(self, weight: np.ndarray) -> np.ndarray:
        """D for a kernel f32, in PyTorch's layout."""
        weight = weight.reshape(self.shape)
        change = FORMS[self.form].change(self, weight)
        return _normalised(weight, change, _f32(self.tensors["dora_scale"])) if self.is_dora else change

    def change_of_bias(self) -> np.ndarray | None:
        """What is added to the bias, f32[out], at strength 1."""
        scales = {"diff_b": 1.0, "b_norm": 1.0, "lora_up.bias": self.k}
        changes = [k * _f32(self.tensors[name]).reshape(-1) for name, k in scales.items() if name in self.tensors]
        return sum(changes[1:], changes[0]) if changes else None

    def low_rank(self) -> Factors | None:
        """D as a product in our layout: down f32[..., in, r], as the kernel has it, and up f32[r, out], k included.

        None where it is none, or does more than that.
        """
        if self.is_dora or self.change_of_bias() is not None:
            return None
        factors = FORMS[self.form].low_rank(self)
        if factors is None:
            return None
        down, up = factors  # [r, in * kh * kw], [out, r]
        r = len(down)
        if len(self.kernel_shape) == 4:
            down = down.reshape(r, *self.shape[1:]).transpose(2, 3, 1, 0)
        else:
            down = down.reshape(r, -1).T
        return np.ascontiguousarray(down), np.ascontiguousarray(up.T * np.float32(self.k))

    def change_in_our_layout(self, leaf: np.ndarray) -> np.ndarray:
        """D for a leaf of our tree, f32, in the layout that it has there."""
        factors = self.low_rank()
        if factors is not None:
            down, up = factors
            return (down.reshape(-1, len(up)) @ up).reshape(leaf.shape)
        return to_ours(self.change(to_theirs(np.asarray(leaf, np.float32), self.shape)), leaf.shape)


def to_theirs(leaf: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A leaf of our tree in PyTorch's layout."""
    return leaf.transpose(*((3, 2, 0, 1) if leaf.ndim == 4 else range(leaf.ndim)[::-1])).reshape(shape)


def to_ours(weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_theirs`. shape: the leaf's."""
    return weight.transpose(2, 3, 1, 0) if len(shape) == 4 else weight.reshape(shape[::-1]).T


def _f32(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32)


def _flat(array: np.ndarray) -> np.ndarray:
    """A matrix, or a convolution as one."""
    array = _f32(array)
    return array.reshape(len(array), -1)


def _normalised(weight: np.ndarray, change: np.ndarray, m: np.ndarray) -> np.ndarray:
    """DoRA's change: the norm of each row (m is [out, 1, ...]) or column (m is [1, in, ...]) of W + D becomes m."""
    v = weight + change
    axes = tuple(axis for axis in range(v.ndim) if axis != int(_is_by_column(m, v.shape)))
    norm = np.sqrt(np.sum(np.square(v), axis=axes, keepdims=True))
    return v * (m.reshape(norm.shape) / (norm + np.finfo(np.float32).eps)) - weight


def _is_by_column(m: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether dora_scale is the norm of columns, for W of this shape."""
    return m.ndim > 1 and m.shape[0] == 1 and m.size == shape[1] and shape[0] != 1


def _tucker(t: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """C[o, i, y, x] = sum_pq t[p, q, y, x] a[p, o] b[q, i]."""
    return np.einsum("pqyx,po,qi->oiyx", _f32(t), _flat(a), _flat(b), optimize=True)


# The forms


def _lora(update: Update, weight: np.ndarray) -> np.ndarray:
    down, up = _lora_factors(update)
    return (up @ down).reshape(update.shape) * np.float32(update.k)


def _lora_factors(update: Update) -> Factors:
    """down [r, in * kh * kw], up [out, r]."""
    tensors = update.tensors
    down, up = _flat(tensors["lora_down"]), _flat(tensors["lora_up"])
    if "lora_mid" in tensors:
        down = np.einsum("nmyx,mi->niyx", _f32(tensors["lora_mid"]), down, optimize=True)
    return down.reshape(len(down), -1), up


def _loha(update: Update, weight: np.ndarray) -> np.ndarray:
    t = update.tensors

    def half(n: int) -> np.ndarray:
        a, b = t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]
        whole = _tucker(t[f"hada_t{n}"], a, b) if f"hada_t{n}" in t else _flat(a) @ _flat(b)
        return whole.reshape(update.shape)

    return half(1) * half(2) * np.float32(update.k)


def _loha_factors(update: Update) -> Factors | None:
    """Every pair of ranks of the two products is one rank of their elementwise product."""
    t = update.tensors
    if {"hada_t1", "hada_t2"} & set(t) or len(t["hada_w1_b"]) * len(t["hada_w2_b"]) > EXPANDED:
        return None
    a1, b1, a2, b2 = (_flat(t[name]) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
    down = (b1[:, None] * b2[None]).reshape(-1, b1.shape[1])
    return down, (a1[:, :, None] * a2[:, None]).reshape(len(a1), -1)


def _lokr(update: Update, weight: np.ndarray) -> np.ndarray:
    t = update.tensors
    w1 = _flat(t["lokr_w1"]) if "lokr_w1" in t else _flat(t["lokr_w1_a"]) @ _flat(t["lokr_w1_b"])
    if "lokr_w2" in t:
        w2 = _f32(t["lokr_w2"])
    elif "lokr_t2" in t:
        w2 = _tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = _flat(t["lokr_w2_a"]) @ _flat(t["lokr_w2_b"])
    (o1, i1), o2 = w1.shape[:2], len(w2)
    w2 = w2.reshape(o2, update.shape[1] // i1, *update.shape[2:])
    return np.einsum("ab,cd...->acbd...", w1, w2).reshape(o1 * o2, *update.shape[1:]) * np.float32(update.k)


def _lokr_rank(t: Tensors) -> int | None:
    whole = "lokr_w1" in t and "lokr_w2" in t
    return None if whole else len(t["lokr_w2_b"] if "lokr_w2_b" in t else t["lokr_w1_b"])


def _ia3(update: Update, weight: np.ndarray) -> np.ndarray:
    shape = [1] * weight.ndim
    shape[_ia3_axis(update.tensors)] = -1
    return weight * _f32(update.tensors["weight"]).reshape(shape)


def _ia3_axis(t: Tensors) -> int:
    """The axis of W along which its weights are."""
    return int(bool(np.any(t.get("on_input", False))))


def _full(update: Update, weight: np.ndarray) -> np.ndarray:
    return _f32(update.tensors["diff"]).reshape(update.shape) if "diff" in update.tensors else np.zeros_like(weight)


def _norm(update: Update, weight: np.ndarray) -> np.ndarray:
    return _f32(update.tensors["w_norm"]).reshape(update.shape)


def _oft(update: Update, weight: np.ndarray) -> np.ndarray:
    t = update.tensors
    if "oft_diag" in t:
        rotation = _f32(t["oft_diag"])
    else:
        blocks = np.asarray(t["oft_blocks"], np.float64)
        q = blocks - blocks.swapaxes(1, 2)
        bound = float(np.asarray(t["alpha"]).reshape(-1)[0]) * len(weight) if "alpha" in t else 0.0
        norm = float(np.linalg.norm(q)) + 1e-8
        if bound > 0 and norm > bound:
            q *= bound / norm
        one = np.eye(q.shape[1])
        rotation = ((one + q) @ np.linalg.inv(one - q)).astype(np.float32)
    rows = weight.reshape(len(rotation), rotation.shape[1], -1)
    turned = np.einsum("knm,knc->kmc", rotation, rows).reshape(weight.shape)
    if "rescale" in t:
        turned = turned * _f32(t["rescale"]).reshape(-1, *[1] * (weight.ndim - 1))
    return turned - weight


def _glora(update: Update, weight: np.ndarray) -> np.ndarray:
    a1, a2, b1, b2 = (_flat(update.tensors[name]) for name in ("a1", "a2", "b1", "b2"))
    if not _is_new_glora(update.tensors):
        a1, a2, b1, b2 = a2, a1, b2, b1
    flat = weight.reshape(len(weight), -1)
    return ((b1 @ b2 + flat @ a1 @ a2) * np.float32(update.k)).reshape(update.shape)


def _is_new_glora(t: Tensors) -> bool:
    """Whether the ranks of a1 and b1 are on the right, as LyCORIS writes them now."""
    return len(t["a1"]) == _flat(t["a2"]).shape[1] and len(t["b1"]) >= _flat(t["b1"]).shape[1]


# What fits


def _size(t: Tensors, name: str, *allowed: int) -> str | None:
    """What is wrong with the number of numbers in a tensor, if it is there."""
    if name not in t or t[name].size in allowed:
        return None
    expected = " or ".join(map(str, dict.fromkeys(allowed)))
    return f"{name} has the shape {t[name].shape}, expected {expected} numbers"


def _sizes(t: Tensors, *expected: tuple[str, int, int]) -> str | None:
    """What is wrong with matrices (name, rows, columns), convolutions counting as such."""
    for name, rows, columns in expected:
        if (len(t[name]), t[name].size) != (rows, rows * columns):
            return f"{name} has the shape {t[name].shape}, expected {rows} x {columns}"
    return None


def _lora_misfit(t: Tensors, shape: tuple[int, ...]) -> str | None:
    out, r = shape[0], len(t["lora_down"])
    if "lora_mid" not in t:
        return _sizes(t, ("lora_down", r, math.prod(shape[1:])), ("lora_up", out, r))
    m = len(t["lora_mid"])
    return _sizes(t, ("lora_down", r, shape[1]), ("lora_mid", m, r * math.prod(shape[2:])), ("lora_up", out, m))


def _loha_misfit(t: Tensors, shape: tuple[int, ...]) -> str | None:
    for n in (1, 2):
        a, b, mid = f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}"
        r = len(t[b])
        if mid in t:
            p = len(t[a])
            wrong = _sizes(t, (a, p, shape[0]), (b, r, shape[1]), (mid, p, r * math.prod(shape[2:])))
        else:
            wrong = _sizes(t, (a, shape[0], r), (b, r, math.prod(shape[1:])))
        if wrong is not None:
            return wrong
    return None


def _glora_misfit(t: Tensors, shape: tuple[int, ...]) -> str | None:
    out, inner = shape[0], math.prod(shape[1:])
    if _is_new_glora(t):
        r, p = len(t["a2"]), len(t["b2"])
        return _sizes(t, ("a1", inner, r), ("a2", r, inner), ("b1", out, p), ("b2", p, inner))
    r, p = len(t["a1"]), len(t["b1"])
    return _sizes(t, ("a1", r, inner), ("a2", inner, r), ("b1", p, inner), ("b2", out, p))


def _oft_misfit(t: Tensors, shape: tuple[int, ...]) -> str | None:
    blocks = t["oft_blocks" if "oft_blocks" in t else "oft_diag"]
    if blocks.ndim == 4:
        return "it is BOFT, which is not applied"
    n, b = blocks.shape[:2]
    if "alpha" in t and not np.isfinite(np.asarray(t["alpha"], np.float32)).all():
        return "alpha holds NaN or infinity"
    if blocks.shape != (n, b, b) or n * b != shape[0]:
        return f"its blocks have the shape {blocks.shape}, expected n x b x b with n b = {shape[0]}"
    return _size(t, "rescale", shape[0])


def _lokr_misfit(t: Tensors, shape: tuple[int, ...]) -> str | None:
    def matrix(n: int) -> tuple[int, int]:
        """Rows and columns of a factor; 0 where its own factors do not fit each other."""
        if f"lokr_w{n}" in t:
            return len(t[f"lokr_w{n}"]), t[f"lokr_w{n}"][0].size
        a, b = t[f"lokr_w{n}_a"], t[f"lokr_w{n}_b"]
        if n == 2 and "lokr_t2" in t:
            fits = t["lokr_t2"].shape[:2] == (len(a), len(b)) and t["lokr_t2"][0, 0].size == math.prod(shape[2:])
            return (a.shape[1], b.shape[1] * math.prod(shape[2:])) if fits else (0, 0)
        return (len(a), b[0].size) if a[0].size == len(b) else (0, 0)

    (o1, i1), (o2, i2) = matrix(1), matrix(2)
    if (o1 * o2, i1 * i2) != (shape[0], math.prod(shape[1:])):
        return f"its factors give {o1 * o2} x {i1 * i2}, expected {shape[0]} x {math.prod(shape[1:])}"
    return f"lokr_w1 has {i1} columns, which do not divide {shape[1]} inputs" if shape[1] % i1 else None


# The table


class Form(NamedTuple):
    """One way of changing a module.

    needs: names of its tensors that are there; one of each group.
    may_have: further ones.
    change: (update, W) -> D without DoRA's norm.
    misfit: (tensors, shape of W) -> what is wrong with their shapes, or None.
    matrices: the tensors that have two axes at least.
    rank: tensors -> what alpha is divided by, or None.
    low_rank: update -> (down [r, in * kh * kw], up [out, r]) without k, or None.
    """

    needs: tuple[str, ...]
    may_have: tuple[str, ...]
    change: Callable[[Update, np.ndarray], np.ndarray]
    misfit: Callable[[Tensors, tuple[int, ...]], str | None]
    matrices: tuple[str, ...] = ()
    rank: Callable[[Tensors], int | None] = lambda tensors: None
    low_rank: Callable[[Update], Factors | None] = lambda update: None

    @property
    def groups(self) -> list[set[str]]:
        """`needs`, as the names of which one has to be there."""
        return [set(need.split("|")) for need in self.needs]


LORA = ("lora_down", "lora_up", "lora_mid")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = tuple(f"lokr_w{n}{end}" for n in (1, 2) for end in ("", "_a", "_b"))
GLORA = ("a1", "a2", "b1", "b2")
CORES = ("lora_mid", "hada_t1", "hada_t2", "lokr_t2")
"""Tucker cores, which have four axes for linear maps, too."""
OF_NORMS = ("full", "norm")
"""The forms that can change a norm's scale."""

FORMS: dict[str, Form] = {
    "lora": Form(
        needs=LORA[:2],
        may_have=("lora_mid", "alpha", "dora_scale", "lora_up.bias", "diff_b"),
        change=_lora,
        misfit=_lora_misfit,
        matrices=LORA,
        rank=lambda t: len(t["lora_down"]),
        low_rank=_lora_factors,
    ),
    "loha": Form(
        needs=LOHA,
        may_have=("hada_t1", "hada_t2", "alpha", "dora_scale", "diff_b"),
        change=_loha,
        misfit=_loha_misfit,
        matrices=(*LOHA, "hada_t1", "hada_t2"),
        rank=lambda t: len(t["hada_w1_b"]),
        low_rank=_loha_factors,
    ),
    "lokr": Form(
        needs=("lokr_w1|lokr_w1_a", "lokr_w1|lokr_w1_b", "lokr_w2|lokr_w2_a", "lokr_w2|lokr_w2_b"),
        may_have=("lokr_t2", "alpha", "dora_scale", "diff_b"),
        change=_lokr,
        misfit=_lokr_misfit,
        matrices=(*LOKR, "lokr_t2"),
        rank=_lokr_rank,
    ),
    "glora": Form(
        needs=GLORA,
        may_have=("alpha",),
        change=_glora,
        misfit=_glora_misfit,
        matrices=GLORA,
        rank=lambda t: len(t["a2" if _is_new_glora(t) else "a1"]),
    ),
    "oft": Form(
        needs=("oft_blocks|oft_diag",),
        may_have=("alpha", "rescale"),
        change=_oft,
        misfit=_oft_misfit,
        matrices=("oft_blocks", "oft_diag"),
    ),
    "ia3": Form(
        needs=("weight",),
        may_have=("on_input", "alpha"),
        change=_ia3,
        misfit=lambda t, shape: _size(t, "weight", shape[_ia3_axis(t)]),
    ),
    "full": Form(
        needs=("diff|diff_b",),
        may_have=("diff", "diff_b", "alpha"),
        change=_full,
        misfit=lambda t, shape: _size(t, "diff", math.prod(shape)),
    ),
    "norm": Form(
        needs=("w_norm",),
        may_have=("b_norm", "alpha"),
        change=_norm,
        misfit=lambda t, shape: _size(t, "w_norm", math.prod(shape)),
    ),
}
"""Every form by its name, in the order in which they are recognised."""


def form_of(names: set[str]) -> str | None:
    """The form that has tensors of these names, all of them; None if there is none."""
    for name, form in FORMS.items():
        needed = form.groups
        if all(names & need for need in needed) and names <= set().union(*needed, form.may_have):
            return name
    return None


def missing_of(names: set[str]) -> str | None:
    """What a half of a pair lacks: the tensor that would make a form of these; None if that cannot be told."""
    best = None
    for form in FORMS.values():
        needed = form.groups
        lacking = [need for need in needed if not names & need]
        if lacking and len(lacking) < len(needed) and (best is None or len(lacking) < len(best)):
            best = lacking
    return " and ".join(min(need) for need in best) if best else None


def expected_shapes(update: Update) -> str | None:
    """What is wrong with the shapes of an update's tensors; None if they fit W."""
    t, shape = update.tensors, update.shape
    flat = next((name for name in FORMS[update.form].matrices if name in t and t[name].ndim < 2), None)
    if flat is not None:
        return f"{flat} has the shape {t[flat].shape}, expected a matrix"
    core = next((name for name in CORES if name in t and t[name].ndim != 4), None)
    if core is not None:
        return f"{core} has the shape {t[core].shape}, expected 4 axes"
    if len(shape) < 2 and update.form not in OF_NORMS:
        return f"it is a norm, which {update.form} does not change"
    wrong = FORMS[update.form].misfit(t, shape)
    for name in ("diff_b", "b_norm", "lora_up.bias"):
        wrong = wrong or _size(t, name, shape[0])
    if update.is_dora:
        wrong = wrong or _size(t, "dora_scale", shape[int(_is_by_column(t["dora_scale"], shape))])
    return wrong or (None if update.form == "oft" else _size(t, "alpha", 1))
