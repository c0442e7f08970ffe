"""Small encoders for training data: a Wan VAE of the real class, and a text encoder with the host's interface."""

import sys

import pytest
import torch


@pytest.fixture(scope="session")
def vae(pack):
    import comfy.sd

    path, argv = sys.path.copy(), sys.argv
    import tiny_models

    weights = tiny_models.wan_vae()
    sys.path[:], sys.argv = path, argv
    return comfy.sd.VAE(sd=weights)


class Tokenizer:
    def tokenize_with_weights(self, text, return_word_ids=False, disable_weights=False):
        return [ord(letter) for letter in text] or [0]


class TextEncoder(torch.nn.Module):
    dtypes = (torch.float32,)

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(256, 8)
        torch.manual_seed(0)
        torch.nn.init.normal_(self.table.weight)

    def reset_clip_options(self):
        pass

    def set_clip_options(self, options):
        pass

    def encode_token_weights(self, tokens):
        return self.table(torch.tensor([tokens], dtype=torch.int64)), None


@pytest.fixture
def clip(pack):
    """The host's CLIP around a table of letters."""
    import comfy.sd

    class Target:
        params, clip, tokenizer = (
            {},
            staticmethod(lambda **params: TextEncoder()),
            staticmethod(lambda **options: Tokenizer()),
        )

    return comfy.sd.CLIP(Target)
