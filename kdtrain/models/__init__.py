"""Networks: backbones by name, the face network over one of them, published weights."""

from kdtrain.models.network import FaceNetwork, network_from_state

__all__ = ["FaceNetwork", "network_from_state"]
