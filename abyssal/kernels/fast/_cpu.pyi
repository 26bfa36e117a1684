"""What the extension module offers; arrays are torch tensors, or anything with DLPack, dense and on the CPU."""

from torch import Tensor

def isas() -> list[tuple[str, bool]]:
    """The instruction sets of this build, best first, and whether the processor has each."""

def isa() -> str:
    """The one in use."""

def use(name: str) -> bool:
    """Use another one; False if it was not built or the processor lacks it."""

def threads() -> int:
    """The most threads that a kernel uses."""

def set_threads(count: int) -> None: ...
def read(data: Tensor) -> int:
    """Sum of the array's 8-byte words, modulo 2**64: one pass over the memory, which others are measured against."""

def pack(
    format: int,  # noqa: A002
    matrices: int,
    outputs: int,
    inputs: int,
    stored: Tensor,
    packed: Tensor,
    back: bool,
    stored_scales: Tensor | None,
    packed_scales: Tensor | None,
) -> None:
    """Bytes of stored matrices, and of FP4's scales, into the order of the kernels, or back."""

def norm(
    x: Tensor, normed: bool, weight: Tensor | None, eps: float, turn: Tensor | None, inverse: bool, y: Tensor
) -> None:
    """Rows x [..., D]: RMSNorm if `normed`, times weight [D]; then the last R times turn, complex64 [..., R/2]."""

def enter(
    x: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor | None,
    rms_eps: float,
    eps: float,
    iterations: int,
    y: Tensor,
    gates: Tensor | None,
) -> None:
    """Streams x [T, N, D] to y [T, D] and gates: all post [T, N], then all mixes [T, N, N]; None: no gates but pre."""

def enter_backward(
    x: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor | None,
    rms_eps: float,
    eps: float,
    iterations: int,
    dy: Tensor,
    dgates: Tensor | None,
    dx: Tensor,
    dfn: Tensor,
    dbase: Tensor,
    dscale: Tensor,
    dnorm: Tensor | None,
) -> None:
    """The gradients of all that `enter` reads, from those of y and gates."""

def leave(y: Tensor, x: Tensor, gates: Tensor, out: Tensor) -> None: ...
def leave_backward(
    y: Tensor, x: Tensor, gates: Tensor, dout: Tensor, dy: Tensor, dx: Tensor, dgates: Tensor
) -> None: ...
def rounding(kind: int, block: int, x: Tensor, y: Tensor) -> None:
    """Rows x [..., D] rounded to FP8 (0) or FP4 (1), a scale for `block` values, or times a Hadamard matrix (2)."""

def route(
    logits: Tensor, bias: Tensor | None, given: Tensor | None, scale: float, weights: Tensor, chosen: Tensor
) -> None:
    """Logits [T, E] to weights [T, K] and chosen [T, K] int64, or the weights of the experts in `given`."""

def experts(
    w1: object,
    w3: object,
    w2: object,
    shared: tuple[object, object, object] | None,
    x: Tensor,
    gains: Tensor,
    chosen: Tensor,
    limit: float,
    block: int,
    y: Tensor,
    kept: tuple[Tensor, ...] | None,
) -> None:
    """Rows x [T, D] through their experts chosen [T, K], summed with gains [T, K], and the shared one; y [T, D].

    `kept` takes gates and ups of the routed experts, [T * K, F] sorted by expert, and those of the shared one.
    """

def experts_backward(
    routed: tuple[Tensor, ...],
    shared: tuple[Tensor, ...] | None,
    x: Tensor,
    gains: Tensor,
    chosen: Tensor,
    limit: float,
    block: int,
    dy: Tensor,
    dx: Tensor,
    dgains: Tensor,
) -> None:
    """Gradients from dy; `routed` and `shared`: w1, w3, w2, what was kept of gate and up, then dw1, dw3, dw2."""

def swiglu(gate: Tensor, up: Tensor, gains: Tensor | None, limit: float, y: Tensor) -> None:
    """Rows [R, F] of gate and up, clamped, activated and multiplied, times gains [R]."""

def index_topk(
    q: Tensor,
    weights: Tensor,
    visible: Tensor,
    firsts: Tensor,
    tables: Tensor,
    keys: Tensor,
    per_page: int,
    blocks: Tensor,
) -> None:
    """The best blocks of each query into `blocks`; see `abyssal.kernels.index_topk.choose_rows`."""

def attend(
    q: Tensor,
    turn: Tensor,
    sink: Tensor,
    eps: float,
    scale: float,
    spans: Tensor,
    fresh: Tensor,
    ring: Tensor,
    window: int,
    ring_size: int,
    ratio: int,
    entries: Tensor | None,
    tables: Tensor | None,
    per_page: int,
    blocks: Tensor | None,
    out: Tensor,
    kept: bool,
) -> None:
    """Attention into `out`, and `fresh` into the ring if `kept`; see `abyssal.kernels.attention.attend`."""

def attend_backward(
    q: Tensor,
    turn: Tensor,
    sink: Tensor,
    eps: float,
    scale: float,
    spans: Tensor,
    fresh: Tensor,
    ring: Tensor,
    window: int,
    ring_size: int,
    ratio: int,
    entries: Tensor | None,
    tables: Tensor | None,
    per_page: int,
    blocks: Tensor | None,
    out: Tensor,
    dout: Tensor,
    dq: Tensor,
    dsink: Tensor,
    dfresh: Tensor,
    dring: Tensor,
    dentries: Tensor | None,
) -> None:
    """The gradients of what `attend` reads, all of it float32, where no two sequences share a page."""

def compress(
    values: Tensor,
    logits: Tensor,
    ape: Tensor,
    spans: Tensor,
    ring_values: Tensor,
    ring_logits: Tensor,
    ring_size: int,
    norm: Tensor,
    eps: float,
    turn: Tensor,
    entries: Tensor | None,
    tables: Tensor | None,
    per_page: int,
    out: Tensor,
) -> None:
    """A compressor's step into `out`, the rings and `entries`; see `abyssal.kernels.pool.compress`."""

def encode(x: Tensor, key: bool, rotated: int, to: Tensor) -> None:
    """Entries or index keys x [R, dim] as the cache stores them, bytes or float32 `to`; see `abyssal.kernels.entry`."""

class AttentionStep:
    """The attention sublayer of one block in one call; weights are `Weight` or float32 tensors, kept alive.

    Tuples: site (fn, base, scale, norm, rms_eps, eps, iterations); q (wq_a, q_norm, wq_b); kv (wkv, kv_norm); out
    (wo_a, wo_b); compressor (wkv, wgate, ape, norm); index (wq_b, weights_proj, compressor, factor, exact).
    """

    def __init__(
        self,
        site: tuple[object, ...],
        q: tuple[object, ...],
        kv: tuple[object, ...],
        sink: Tensor,
        out: tuple[object, ...],
        rotated: int,
        window: int,
        softmax_scale: float,
        block: int,
        exact: bool,
        compressor: tuple[object, ...] | None,
        index: tuple[object, ...] | None,
    ) -> None: ...
    def __call__(
        self,
        streams: Tensor,
        turn: Tensor,
        spans: Tensor,
        ring: Tensor,
        ring_size: int,
        tables: Tensor,
        compressed: tuple[object, ...] | None,
        keys: tuple[object, ...] | None,
        block_turn: Tensor | None,
        firsts: Tensor | None,
        visible: Tensor | None,
        chosen: Tensor | None,
        out: Tensor,
    ) -> None:
        """Streams [T, N, D] to `out`; adds the tokens to the caches (values, logits, ring_size, entries, per_page).

        `chosen` [T, K] receives the indexer's choice; None: each token reads every block that it sees.
        """

class MoeStep:
    """The MoE sublayer of one block in one call; `table` holds the experts of each token id in hash-routed blocks."""

    def __init__(
        self,
        site: tuple[object, ...],
        gate: object,
        bias: Tensor | None,
        table: Tensor | None,
        k: int,
        scale: float,
        routed: tuple[object, ...],
        shared: tuple[object, ...],
        limit: float,
        block: int,
    ) -> None: ...
    def __call__(self, streams: Tensor, ids: Tensor, out: Tensor) -> None:
        """Streams [T, N, D] to `out`."""

def draw(logits: object, ids: object | None, seed: int, choice: int, place: int) -> int:
    """The token with the largest sum of logit (float64) and noise, among `ids`; -1 where NumPy has to say."""
