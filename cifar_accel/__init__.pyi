from cifar_accel.errors import BadInput as BadInput
from cifar_accel.results.runs import RunFiles as RunFiles
from cifar_accel.results.runs import read_runs as read_runs
from cifar_accel.use.classifier import Classifier as Classifier
from cifar_accel.use.classifier import Prediction as Prediction
from cifar_accel.use.classifier import load as load
from cifar_accel.use.classifier import predict as predict

__version__: str
