"""llama.cpp's expert kernels, called through the C interface of the ggml libraries that llama-cpp-python installs.

What runs is what llama.cpp itself runs for the routed experts of one layer: a graph of `mul_mat_id` over stacks of
quantised matrices (gate, up), SwiGLU, `mul_mat_id` (down) and the weighted sum over the chosen experts, computed by
ggml's CPU backend with a thread pool made once. Only opaque pointers cross the boundary, except for `ggml_init_params`,
so that the file does not depend on the layout of ggml's structures.
"""

import ctypes
import importlib.util
import itertools
import mmap
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from hybrid.errors import KimiError, MissingExtra, UsageError
from quant.bench import Shape

POINTER, SIZE, INT, LONG, TEXT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64, ctypes.c_char_p
LOG = ctypes.CFUNCTYPE(None, INT, TEXT, POINTER)
F32, I32 = 0, 26  # ggml_type
PARAMS_ROOM = 4096  # bytes; ggml_threadpool_params needs about 530
TYPES = {  # ggml_type as stored in GGUF files
    "q4_0": 2,
    "q2_K": 10,
    "q3_K": 11,
    "q4_K": 12,
    "iq2_xxs": 16,
    "iq2_xs": 17,
    "iq3_xxs": 18,
    "iq1_s": 19,
    "iq4_nl": 20,
    "iq3_s": 21,
    "iq2_s": 22,
    "iq4_xs": 23,
    "iq1_m": 29,
    "tq1_0": 34,
    "tq2_0": 35,
    "mxfp4": 39,
}
VERSIONS = 16  # of an expert with different contents; further experts repeat them in memory of their own
PATTERN = 1024  # random rows; a version is these rows, rotated and repeated


class InitParams(ctypes.Structure):
    """ggml_init_params"""

    _fields_ = [("mem_size", SIZE), ("mem_buffer", POINTER), ("no_alloc", ctypes.c_bool)]


class Layout(NamedTuple):
    """A quantised type and where its weights go."""

    type: str
    name: str
    place: int  # ggml_backend_buffer_type_t


class Projections(NamedTuple):
    """One array for each of an expert's matrices."""

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray


SIGNATURES: dict[str, tuple[Any, ...]] = {  # name: result, arguments
    "ggml_version": (TEXT,),
    "ggml_log_set": (None, LOG, POINTER),
    "ggml_init": (POINTER, InitParams),
    "ggml_free": (None, POINTER),
    "ggml_tensor_overhead": (SIZE,),
    "ggml_graph_overhead": (SIZE,),
    "ggml_type_name": (TEXT, INT),
    "ggml_row_size": (SIZE, INT, LONG),
    "ggml_blck_size": (LONG, INT),
    "ggml_quantize_requires_imatrix": (ctypes.c_bool, INT),
    "ggml_quantize_chunk": (SIZE, INT, POINTER, POINTER, LONG, LONG, LONG, POINTER),
    "ggml_new_tensor_2d": (POINTER, POINTER, INT, LONG, LONG),
    "ggml_new_tensor_3d": (POINTER, POINTER, INT, LONG, LONG, LONG),
    "ggml_view_2d": (POINTER, POINTER, POINTER, LONG, LONG, SIZE, SIZE),
    "ggml_mul_mat_id": (POINTER, POINTER, POINTER, POINTER, POINTER),
    "ggml_swiglu_split": (POINTER, POINTER, POINTER, POINTER),
    "ggml_mul": (POINTER, POINTER, POINTER, POINTER),
    "ggml_add": (POINTER, POINTER, POINTER, POINTER),
    "ggml_new_graph": (POINTER, POINTER),
    "ggml_build_forward_expand": (None, POINTER, POINTER),
    "ggml_backend_cpu_init": (POINTER,),
    "ggml_backend_cpu_reg": (POINTER,),
    "ggml_backend_cpu_buffer_type": (POINTER,),
    "ggml_backend_cpu_set_n_threads": (None, POINTER, INT),
    "ggml_backend_cpu_set_threadpool": (None, POINTER, POINTER),
    "ggml_threadpool_params_init": (None, POINTER, INT),
    "ggml_threadpool_new": (POINTER, POINTER),
    "ggml_backend_get_device": (POINTER, POINTER),
    "ggml_backend_reg_get_proc_address": (POINTER, POINTER, TEXT),
    "ggml_backend_buft_name": (TEXT, POINTER),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, POINTER, POINTER),
    "ggml_backend_alloc_ctx_tensors_from_buft": (POINTER, POINTER, POINTER),
    "ggml_backend_buffer_get_base": (POINTER, POINTER),
    "ggml_backend_buffer_get_size": (SIZE, POINTER),
    "ggml_backend_buffer_free": (None, POINTER),
    "ggml_backend_tensor_set": (None, POINTER, POINTER, SIZE, SIZE),
    "ggml_backend_tensor_get": (None, POINTER, POINTER, SIZE, SIZE),
    "ggml_backend_graph_compute": (INT, POINTER, POINTER),
}


def libraries() -> list[ctypes.CDLL]:
    """ggml's base and CPU libraries. Raises MissingExtra when llama-cpp-python is not installed."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or not found.submodule_search_locations:
        raise MissingExtra(
            "The comparison needs llama.cpp's libraries.", "Run: pip install llama-cpp-python (it builds from source)"
        )
    directory = Path(found.submodule_search_locations[0]) / "lib"
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    try:
        return [
            ctypes.CDLL(str(directory / f"lib{name}{suffix}"), mode=ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml-cpu")
        ]
    except OSError as error:
        raise KimiError(
            f"llama-cpp-python brings no CPU library built for one machine: {error}.",
            "Run: CMAKE_ARGS=-DGGML_NATIVE=ON pip install --force-reinstall --no-deps --no-binary llama-cpp-python "
            "llama-cpp-python",
        ) from error


@LOG
def _no_log(level: int, text: bytes, data: int | None) -> None:
    """ggml reports every repacked tensor; nobody asked."""


class Ggml:
    """The libraries, one CPU backend, and a thread pool for each number of threads in use."""

    def __init__(self) -> None:
        self.libraries = libraries()
        self.call = SimpleNamespace(**{name: self._bound(name, *types) for name, types in SIGNATURES.items()})
        self.call.ggml_log_set(_no_log, None)
        self.backend = self.call.ggml_backend_cpu_init()
        self.device = self.call.ggml_backend_get_device(self.backend)
        self.pools: dict[int, int] = {}

    def _bound(self, name: str, result: Any, *arguments: Any) -> Any:
        found = self.exported(name)
        if found is None:
            raise KimiError(f"This llama-cpp-python has no {name}.", "Run: pip install llama-cpp-python==0.3.36")
        found.restype, found.argtypes = result, arguments
        return found

    def exported(self, name: str) -> Any:
        """A function of either library, or None."""
        return next((getattr(library, name) for library in self.libraries if hasattr(library, name)), None)

    @property
    def version(self) -> str:
        return self.call.ggml_version().decode()

    @property
    def features(self) -> list[str]:
        """Instruction sets the library was compiled for, of those that matter here."""
        names = ("avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8", "neon", "dotprod")
        return [name for name in names if self.exported(f"ggml_cpu_has_{name}")()]

    def set_threads(self, threads: int) -> None:
        if threads not in self.pools:
            params = ctypes.create_string_buffer(PARAMS_ROOM)
            self.call.ggml_threadpool_params_init(params, threads)
            self.pools[threads] = self.call.ggml_threadpool_new(params)
        self.call.ggml_backend_cpu_set_n_threads(self.backend, threads)
        self.call.ggml_backend_cpu_set_threadpool(self.backend, self.pools[threads])

    def type_of(self, name: str) -> int:
        """ggml's number of a quantised type. Raises UsageError for any other name."""
        if name not in TYPES:
            raise UsageError(f"No llama.cpp type {name!r}.", f"Use one of: {', '.join(TYPES)}.")
        assert self.call.ggml_type_name(TYPES[name]) == name.encode()
        return TYPES[name]

    def bytes_per_expert(self, name: str, shape: Shape) -> int:
        """Of its three matrices. Raises UsageError when rows are not whole blocks of the type."""
        number = self.type_of(name)
        block = self.call.ggml_blck_size(number)
        if shape.hidden % block or shape.intermediate % block:
            raise UsageError(f"{name} comes in blocks of {block} weights.", "Use sizes that are multiples of it.")
        return sum(rows * self.call.ggml_row_size(number, columns) for rows, columns in matrices(shape))

    def layouts(self, name: str, shape: Shape, top_k: int) -> list[Layout]:
        """As stored in a file and, where this machine has one, llama.cpp's default: repacked for its vectors."""
        self.bytes_per_expert(name, shape)
        plain = Layout(name, name, self.call.ggml_backend_cpu_buffer_type())
        found = [plain] + [Layout(name, f"{name} repacked", place) for place in self._repacking()]
        return [layout for layout in found if self._runs(layout, shape, top_k)]

    def _runs(self, layout: Layout, shape: Shape, top_k: int) -> bool:
        with closing(GgmlExperts(self, layout, shape, top_k, top_k)) as experts:
            products = experts.graph(1).products
            return all(self.call.ggml_backend_dev_supports_op(self.device, product) for product in products)

    def _repacking(self) -> list[int]:
        """The buffer type that repacks, if the library has it."""
        registry = self.call.ggml_backend_cpu_reg()
        address = self.call.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return []
        types = ctypes.CFUNCTYPE(ctypes.POINTER(POINTER), POINTER)(address)(self.device)
        places = itertools.takewhile(bool, (types[index] for index in itertools.count()))
        return [place for place in places if self.call.ggml_backend_buft_name(place) == b"CPU_REPACK"]

    def quantize(self, name: str, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """fp32 [rows, columns] -> (ggml's rows as uint8 [rows, bytes], their meaning as fp32 [rows, columns])."""
        number, (rows, columns) = self.type_of(name), matrix.shape
        matrix = np.ascontiguousarray(matrix, np.float32)
        importance = np.ones(columns, np.float32)
        needed = importance.ctypes.data if self.call.ggml_quantize_requires_imatrix(number) else None
        raw = np.zeros((rows, self.call.ggml_row_size(number, columns)), np.uint8)
        self.call.ggml_quantize_chunk(number, matrix.ctypes.data, raw.ctypes.data, 0, rows, columns, needed)
        decoded = np.empty((rows, columns), np.float32)
        decode = self.exported(f"dequantize_row_{name}")
        decode.restype, decode.argtypes = None, [POINTER, POINTER, LONG]
        decode(raw.ctypes.data, decoded.ctypes.data, decoded.size)
        return raw, decoded


def matrices(shape: Shape) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of gate, up and down."""
    wide = shape.intermediate, shape.hidden
    return wide, wide, shape.down


def version_rows(version: int, rows: int) -> np.ndarray:
    """Which of the PATTERN random rows the `rows` rows of an expert of this version are."""
    return (version * (PATTERN // VERSIONS) + np.arange(rows)) % PATTERN


class Graph(NamedTuple):
    """Pointers to a computation and its inputs and output."""

    context: int
    buffer: int
    graph: int
    x: int  # fp32 [tokens, 1, hidden]
    ids: int  # int32 [tokens, top_k]
    weights: int  # fp32 [tokens, top_k, 1]
    y: int  # fp32 [tokens, hidden]
    products: tuple[int, ...]  # the mul_mat_id nodes


class GgmlExperts:
    """The routed experts of one layer in a llama.cpp type, stacked, and a graph for each batch size in use."""

    def __init__(self, ggml: Ggml, layout: Layout, shape: Shape, count: int, top_k: int) -> None:
        self.ggml, self.shape, self.count, self.top_k = ggml, shape, count, top_k
        self.graphs: dict[int, Graph] = {}
        self.context = self._context(3)
        number = ggml.type_of(layout.type)
        self.stacks = [
            ggml.call.ggml_new_tensor_3d(self.context, number, columns, rows, count)
            for rows, columns in matrices(shape)
        ]
        self.buffer = ggml.call.ggml_backend_alloc_ctx_tensors_from_buft(self.context, layout.place)
        assert self.buffer, "ggml found no memory"

    def _context(self, tensors: int) -> int:
        size = tensors * self.ggml.call.ggml_tensor_overhead() + self.ggml.call.ggml_graph_overhead()
        return self.ggml.call.ggml_init(InitParams(size, None, True))

    def fill(self, raw: Projections) -> None:
        """Write all experts from PATTERN quantised rows of each matrix, each expert into memory of its own."""
        call = self.ggml.call
        use_huge_pages(call.ggml_backend_buffer_get_base(self.buffer), call.ggml_backend_buffer_get_size(self.buffer))
        for stack, rows, (count, _) in zip(self.stacks, raw, matrices(self.shape), strict=True):
            data = np.empty((self.count, count, rows.shape[1]), np.uint8)
            for expert in range(self.count):
                np.take(rows, version_rows(expert % VERSIONS, count), axis=0, out=data[expert], mode="clip")
            call.ggml_backend_tensor_set(stack, data.ctypes.data, 0, data.nbytes)

    def graph(self, tokens: int) -> Graph:
        """y = sum over k of weights[k] * down(swiglu(gate(x), up(x))), experts chosen by ids."""
        if tokens not in self.graphs:
            self.graphs[tokens] = self._graph(tokens)
        return self.graphs[tokens]

    def _graph(self, tokens: int) -> Graph:
        call, (hidden, _), k = self.ggml.call, self.shape, self.top_k
        context = self._context(16 + 2 * k)
        x = call.ggml_new_tensor_3d(context, F32, hidden, 1, tokens)
        ids = call.ggml_new_tensor_2d(context, I32, k, tokens)
        weights = call.ggml_new_tensor_3d(context, F32, 1, k, tokens)
        up = call.ggml_mul_mat_id(context, self.stacks[1], x, ids)
        gate = call.ggml_mul_mat_id(context, self.stacks[0], x, ids)
        down = call.ggml_mul_mat_id(context, self.stacks[2], call.ggml_swiglu_split(context, gate, up), ids)
        weighted = call.ggml_mul(context, down, weights)
        row = 4 * hidden
        parts = [call.ggml_view_2d(context, weighted, hidden, tokens, k * row, i * row) for i in range(k)]
        y = parts[0]
        for part in parts[1:]:
            y = call.ggml_add(context, y, part)
        graph = call.ggml_new_graph(context)
        call.ggml_build_forward_expand(graph, y)
        buffer = call.ggml_backend_alloc_ctx_tensors_from_buft(context, call.ggml_backend_cpu_buffer_type())
        return Graph(context, buffer, graph, x, ids, weights, y, (gate, up, down))

    def step(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """fp32 x [tokens, hidden], integer ids and fp32 weights [tokens, top_k] -> fp32 [tokens, hidden]."""
        call, graph = self.ggml.call, self.graph(len(x))
        for tensor, value in ((graph.x, x), (graph.ids, ids.astype(np.int32)), (graph.weights, weights)):
            call.ggml_backend_tensor_set(tensor, value.ctypes.data, 0, value.nbytes)
        status = call.ggml_backend_graph_compute(self.ggml.backend, graph.graph)
        assert status == 0, status
        y = np.empty_like(x)
        call.ggml_backend_tensor_get(graph.y, y.ctypes.data, 0, y.nbytes)
        return y

    def close(self) -> None:
        for graph in self.graphs.values():
            self.ggml.call.ggml_backend_buffer_free(graph.buffer)
            self.ggml.call.ggml_free(graph.context)
        self.ggml.call.ggml_backend_buffer_free(self.buffer)
        self.ggml.call.ggml_free(self.context)


def use_huge_pages(address: int, size: int) -> None:
    """Ask for 2 MB pages before the memory is first touched, so that both programs read memory of the same kind."""
    if sys.platform == "linux":
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [POINTER, SIZE, INT]
        madvise(start, address + size - start, mmap.MADV_HUGEPAGE)
