"""Small networks and their images, ready to be quantized."""

from __future__ import annotations

from diplugin.quantize import Bits, EndLayers

FREE_ENDS = EndLayers(None, None)


def prepared(make_net, make_images, kind="residual", bits=None):
    model, _ = make_net(kind)
    images = make_images(80)
    loader = images.loader(40)
    return model.eval(), loader, (loader[0][0][:1],), bits or Bits(ends=FREE_ENDS, images=80)
