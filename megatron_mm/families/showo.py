"""Show-o (arXiv 2408.12528): text left to right, images as masked codes, under one mask that fits both.

    text to image   T2I  BOS  text ...  EOS  BOI  code or MASK ...  EOI
    image to text   MMU  BOI  code ...  EOI  BOS  text ...  EOS
    text            BOS  text ...  EOS
    interleaved     BOS  text ...  BOI  code ...  EOI  text ...  EOS

Text is causal. BOI, codes and EOI see each other and all that comes before them; so does MMU, behind which they stand.
Masked codes are predicted in place (not shifted), text from the position before it.

Where the paper is silent: an image that ends an interleaved document is masked, all others are given; EOI is never
predicted, since an image's size is known. The official code counts BOI and EOI among the masked codes' labels; the
paper does not, and neither does this.
"""

from __future__ import annotations

from megatron_mm.config.masked import ShowoConfig
from megatron_mm.data.shape import ImagePart, Shape
from megatron_mm.documents.builder import PREDICTED
from megatron_mm.documents.choices import Choices, drawing_one
from megatron_mm.documents.spans import Items, Role, special, task_first, text
from megatron_mm.families.masked import LM, MMU, MaskedFamily


class Showo(MaskedFamily[ShowoConfig]):
    """See `Family`."""

    name = "showo"
    fields = PREDICTED

    def choices(self, shape: Shape) -> Choices:
        return drawing_one(shape, self.config.generation_share, self.config.condition_dropout)

    def spans(self, shape: Shape) -> Items:
        def image(part: ImagePart) -> Items:
            return self.image(part, Role.next_if(part.loss and not shape.draws and not shape.reads), term)

        term = MMU if shape.images else LM
        end = special(self.vocab.eos, Role.next_if(shape.learns_text), term)
        return task_first(shape, self.vocab, lambda part: text(part, self.vocab, term), image, [end])
