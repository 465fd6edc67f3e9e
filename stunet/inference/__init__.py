"""Prediction in bounded memory: nnU-Net's labels without nnU-Net's arrays of all logits."""

from stunet.inference.folders import parse_memory, predict_folder
from stunet.inference.images import Case, find_cases, read_geometry
from stunet.inference.model import Model, load_model, published_model
from stunet.inference.predictor import Predictor, predict
