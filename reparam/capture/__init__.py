"""nn.Module to graph: a real run of a private copy, recorded."""

from reparam.capture.captured import Capture as Capture
from reparam.capture.copies import in_eval_mode as in_eval_mode
from reparam.capture.copies import own_tensors as own_tensors
from reparam.capture.copies import private_copy as private_copy
from reparam.capture.copies import tensor_storages as tensor_storages
from reparam.capture.copies import tensors_in as tensors_in
from reparam.capture.copies import unwrapped as unwrapped
from reparam.capture.program import capture as capture
from reparam.capture.program import capture_parts as capture_parts
from reparam.capture.program import record as record
from reparam.capture.state import move_hooks as move_hooks
from reparam.capture.state import unchanged as unchanged
from reparam.capture.structures import larger as larger
