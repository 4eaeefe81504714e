"""CLIP as a visual teacher. Legend: B clips, T segments, H W pixels, C classes."""

from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.data.dataset import Split
from distav.tools.pseudo_label.hub import import_transformers, load_pretrained, tokenize
from distav.tools.pseudo_label.prompts import Prompts


class CLIPTeacher:
    """CLIP (Radford et al. 2021): scaled cosine similarity of one frame per segment and a caption per class."""

    modality: ClassVar[str] = "visual"

    def __init__(self, prompts: Prompts, device: torch.device):
        """Load the network and embed the captions.

        Raises:
            UserError: if transformers is missing, or if the checkpoint is not a CLIP checkpoint.
        """
        transformers = import_transformers()
        self.device = device
        self.model = load_pretrained(transformers.CLIPModel, prompts.checkpoint).eval().to(device)
        self.frame_size = int(self.model.config.vision_config.image_size)
        image_processor = load_pretrained(transformers.AutoImageProcessor, prompts.checkpoint)
        self.mean = torch.tensor(image_processor.image_mean, device=device)
        self.std = torch.tensor(image_processor.image_std, device=device)
        tokens = tokenize(transformers, prompts.checkpoint, prompts.captions, device)
        with torch.inference_mode():
            captions = self.model.get_text_features(**tokens).pooler_output
            self.captions = F.normalize(captions.float(), dim=1)

    @classmethod
    def from_prompts(cls, prompts: Prompts, split: Split, device: torch.device) -> Self:
        """Return the teacher; frames do not depend on the split."""
        del split
        return cls(prompts, device)

    @torch.inference_mode()
    def scores(self, media: Tensor) -> Tensor:
        """Return [B, T, C] float32 scores of frames [B, T, H, W, 3] uint8, H = W = `frame_size`."""
        frames = (media.to(self.device).float() / 255 - self.mean) / self.std
        images = frames.flatten(0, 1).permute(0, 3, 1, 2)
        embeddings = F.normalize(self.model.get_image_features(pixel_values=images).pooler_output.float(), dim=1)
        logits = self.model.logit_scale.exp() * embeddings @ self.captions.T
        return logits.float().unflatten(0, media.shape[:2])
