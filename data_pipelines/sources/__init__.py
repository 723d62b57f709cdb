"""Read pictures with captions as people keep them, into one list: the sources that `pack` takes."""

from softmoe_clip.data_pipelines.sources.items import NO_PICTURE, PICTURES, Source, SourceItem
from softmoe_clip.data_pipelines.sources.read import read_source

__all__ = ["NO_PICTURE", "PICTURES", "Source", "SourceItem", "read_source"]
