"""Networks: backbones by name, the face network over one of them, published weights."""

from kdtrain.models.network import (
    FaceNetwork,
    Outputs,
    count_parameters,
    multiply_adds,
    network_from_state,
)

__all__ = ["FaceNetwork", "Outputs", "count_parameters", "multiply_adds", "network_from_state"]
