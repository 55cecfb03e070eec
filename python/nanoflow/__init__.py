"""nanoflow: LLM serving that overlaps compute, memory and network work inside one device."""

from importlib.metadata import PackageNotFoundError, version

from nanoflow.async_llm import AsyncLLM
from nanoflow.errors import EngineError
from nanoflow.llm import LLM
from nanoflow.outputs import CompletionOutput, Logprob, RequestOutput
from nanoflow.sampling_params import RequestOutputKind, SamplingParams
from nanoflow.structured import StructuredOutputsParams

AsyncLLMEngine = AsyncLLM  # its other name in vLLM

try:
    __version__ = version("nanoflow")
except PackageNotFoundError:  # a checkout on the path that is not installed
    __version__ = "unknown"

__all__ = [
    "LLM",
    "AsyncLLM",
    "AsyncLLMEngine",
    "CompletionOutput",
    "EngineError",
    "Logprob",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
]
