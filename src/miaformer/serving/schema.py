"""What goes in and comes out, as the OpenAPI page describes it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class GuessReply(BaseModel):
    label: int
    name: str | None = Field(alias="class", description="of the label, where the model has names")
    probability: float


class SpentReply(BaseModel):
    picture: str = Field(description="its file's name, as the request gave it")
    macs_fraction: float = Field(description="what it took, of the dense model's multiply-accumulates")
    depth_kept: float = Field(description="share of blocks that were executed")
    heads_kept: float = Field(description="share of heads, in executed blocks")
    tokens_kept: float = Field(description="share of patch tokens, in executed blocks")
    budget: float | None = Field(description="that it was given; null where the model has none")
    lowered: bool = Field(description="given less than was asked, because the server is under load")


class PictureReply(SpentReply, GuessReply):
    top_k: list[GuessReply] = Field(description="the likeliest, best first")


class EmbeddingReply(SpentReply):
    features: list[float] = Field(description="what the classifier reads, pooled")


class EmbedReply(BaseModel):
    embeddings: list[EmbeddingReply] = Field(description="in the order of the request's files")
    ms: float = Field(description="from the request's arrival to its answer")


class PredictReply(BaseModel):
    predictions: list[PictureReply] = Field(description="in the order of the request's files")
    ms: float = Field(description="from the request's arrival to its answer")


class Problem(BaseModel):
    detail: str = Field(description="what was wrong, and what would do")


class Health(BaseModel):
    status: str = Field(description="ok, or what is wrong")
    model: str
    version: str = Field(description="of miaformer")
    classes: int
    image_size: tuple[int, int] = Field(description="height and width that pictures are brought to")
    blocks: int
    heads: int
    budget: float | None = Field(description="the most that a picture is given")
    min_budget: float | None = Field(description="the least that load lowers it to")
    p95_ms: float = Field(description="the latency objective")
    queue: int = Field(description="pictures admitted and not answered")
    serving_budget: float | None = Field(description="what a picture that comes now is given")


def body_of_pictures() -> dict[str, Any]:
    """Of an operation that reads its body itself."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    files = {
        "type": "object",
        "properties": {
            "file": {"type": "array", "items": {"type": "string", "format": "binary"}},
            "budget": {"type": "number"},
            "cap": {"type": "number"},
            "top_k": {"type": "integer"},
        },
        "required": ["file"],
    }
    return {
        "requestBody": {
            "required": True,
            "description": "a picture's bytes, or a form with a file for each picture, in fields of any name",
            "content": {
                "multipart/form-data": {"schema": files},
                "application/octet-stream": binary,
                "image/*": binary,
            },
        }
    }
