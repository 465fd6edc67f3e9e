"""Prediction in bounded memory: nnU-Net's labels without nnU-Net's arrays of all logits."""

from stunet.inference.folders import FolderListener, FolderRequest, predict_folder
from stunet.inference.images import Case, Geometry, find_cases, read_geometry
from stunet.inference.label_names import LabelNames, label_names
from stunet.inference.labels import predict_labels
from stunet.inference.memory import Strategy, available_bytes, choose_strategy, parse_memory, stock_bytes
from stunet.inference.model import Model, load_model, published_model
from stunet.inference.outputs import OutputOptions
from stunet.inference.pipeline import Listener, Prediction, predict_cases
from stunet.inference.preparation import PreparationJob, Prepared, prepare
from stunet.inference.resampling import AxisMap, LabelResampler, axis_maps
from stunet.inference.windows import WindowGrid, mirror_and_predict, predict_planes, window_grid

__all__ = [
    "AxisMap",
    "Case",
    "FolderListener",
    "FolderRequest",
    "Geometry",
    "LabelNames",
    "LabelResampler",
    "Listener",
    "Model",
    "OutputOptions",
    "Prediction",
    "PreparationJob",
    "Prepared",
    "Strategy",
    "WindowGrid",
    "available_bytes",
    "axis_maps",
    "choose_strategy",
    "find_cases",
    "label_names",
    "load_model",
    "mirror_and_predict",
    "parse_memory",
    "predict_cases",
    "predict_folder",
    "predict_labels",
    "predict_planes",
    "prepare",
    "published_model",
    "read_geometry",
    "stock_bytes",
    "window_grid",
]
