"""Draw a scene with Pillow: supersampled shapes with a texture, a soft shadow and a quiet grey background."""

import io
import math
import signal
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from softmoe_clip.data_pipelines.processes import SPAWN, usable_cores
from softmoe_clip.data_pipelines.scenes_grammar import Scene, Thing

# Ground and pattern colour of each name. Neighbours in hue differ in lightness, so that people with a colour
# vision deficiency can tell them apart too (see the test).
PALETTE = {
    "red": ((222, 40, 48), (255, 214, 210)),
    "orange": ((247, 138, 25), (255, 240, 214)),
    "yellow": ((252, 219, 52), (176, 130, 0)),
    "green": ((38, 156, 84), (205, 243, 205)),
    "cyan": ((84, 214, 228), (14, 104, 132)),
    "blue": ((32, 98, 224), (206, 221, 255)),
    "purple": ((110, 34, 150), (232, 206, 250)),
    "pink": ((240, 118, 184), (255, 236, 247)),
    "brown": ((104, 58, 24), (236, 208, 178)),
    "black": ((24, 25, 30), (196, 200, 208)),
}
SUPERSAMPLE = 4
SHADOW = 82  # of 255
Polygon = list[tuple[float, float]]


def draw(scene: Scene, image_size: int = 64) -> Image.Image:
    """Draw the scene as an RGB picture of `image_size` x `image_size` pixels, the same for the same scene."""
    rng = np.random.default_rng([*scene.seed, 1])
    picture = _background(image_size, scene.grey, rng)
    drop = max(1, round(image_size / 48))
    for thing in reversed(scene.things):  # from back to front
        patch, (left, top) = _patch(thing, image_size, rng)
        shadow = Image.new("L", picture.size)
        shadow.paste(SHADOW, (left + drop // 2, top + drop), patch.getchannel("A"))
        picture.paste((20, 22, 30), mask=shadow.filter(ImageFilter.GaussianBlur(image_size / 40)))
        picture.paste(patch, (left, top), patch)
    return picture


def png(scene: Scene, image_size: int = 64) -> bytes:
    """Draw a scene into the bytes of a PNG file."""
    file = io.BytesIO()
    draw(scene, image_size).save(file, "PNG", compress_level=1)
    return file.getvalue()


def pictures(scenes: list[Scene], image_size: int, num_processes: int) -> Iterator[bytes]:
    """Yield each scene's PNG in order, drawn by that many processes; the bytes don't depend on their number."""
    if num_processes == 1:
        yield from (png(scene, image_size) for scene in scenes)
        return
    # No pool: a script without `if __name__` starts none of them, and its scenes are drawn here.
    processes, receivers = [], []
    try:
        for first in range(num_processes):
            receiver, sender = SPAWN.Pipe(duplex=False)
            share = (sender, scenes[first::num_processes], image_size)
            processes.append(SPAWN.Process(target=_draw_share, args=share, daemon=True))
            processes[-1].start()
            sender.close()
            receivers.append(receiver)
        for index, scene in enumerate(scenes):
            try:
                yield receivers[index % num_processes].recv_bytes()
            except EOFError:  # that process could not start, or is gone
                yield png(scene, image_size)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def usable_processes(num_pictures: int) -> int:
    """Count the processes worth starting: one per usable core, and only one for few pictures."""
    return min(usable_cores(), 8, 1 + num_pictures // 1000)


def _draw_share(sender, scenes: list[Scene], image_size: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    try:
        for scene in scenes:
            sender.send_bytes(png(scene, image_size))
    except BrokenPipeError:  # the parent stopped
        pass


def _background(image_size: int, grey: float, rng: np.random.Generator) -> Image.Image:
    """Light grey, a little warm or cool, with a faint slope, soft clouds and grain."""
    tint = rng.uniform(-5, 5) * np.array([1, 0.2, -1])
    angle = rng.uniform(0, 2 * math.pi)
    across = np.linspace(-1, 1, image_size, dtype=np.float32)
    slope = rng.uniform(2, 12) * (math.cos(angle) * across + math.sin(angle) * across[:, None])
    clouds = Image.fromarray(rng.normal(0, 4, (4, 4)).astype(np.float32)).resize(
        (image_size,) * 2, Image.Resampling.BICUBIC
    )
    grain = rng.integers(-2, 3, (image_size, image_size))
    plane = grey + slope + np.asarray(clouds) + grain
    return Image.fromarray(np.clip(plane[..., None] + tint, 0, 255).astype(np.uint8))


def _patch(thing: Thing, image_size: int, rng: np.random.Generator) -> tuple[Image.Image, tuple[int, int]]:
    """Draw one thing on a clear square; return it with the square's upper left corner in the picture."""
    radius = thing.size * image_size / 2
    left, top = (math.floor(centre * image_size - radius) - 1 for centre in (thing.x, thing.y))
    side = math.ceil(2 * radius) + 3
    centre = np.array([thing.x * image_size - left, thing.y * image_size - top]) * SUPERSAMPLE
    angle = math.radians(rng.uniform(-7, 7))
    mask, rim = _mask_and_rim(thing.shape, side * SUPERSAMPLE, centre, radius * SUPERSAMPLE, angle, image_size)
    base, accent = (tuple(int(level) for level in colour + rng.uniform(-7, 7, 3)) for colour in PALETTE[thing.colour])
    patch = Image.new("RGB", (side, side), base)
    if thing.texture != "plain":
        pattern = _pattern(thing, side * SUPERSAMPLE, centre, image_size * SUPERSAMPLE, rng)
        patch.paste(accent, mask=Image.fromarray(pattern.view(np.uint8) * np.uint8(255)).reduce(SUPERSAMPLE))
    patch.paste(tuple(int(level * 0.72) for level in base), mask=rim.reduce(SUPERSAMPLE))
    patch.putalpha(mask.reduce(SUPERSAMPLE))
    return patch, (left, top)


def _mask_and_rim(shape, side, centre, radius, angle, image_size) -> tuple[Image.Image, Image.Image]:
    """Fill the outlines of a shape one over the other (a second one is a hole), and draw their edges."""
    mask, rim = Image.new("L", (side, side)), Image.new("L", (side, side))
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    width = max(2, round(image_size * SUPERSAMPLE / 50))
    for outline, fill in zip(OUTLINES[shape], (255, 0), strict=False):
        points = [tuple(point) for point in np.array(outline) @ turn * radius + centre]
        ImageDraw.Draw(mask).polygon(points, fill=fill)
        joint = "curve" if len(points) < 20 else None
        ImageDraw.Draw(rim).line([*points, *points[:2]], fill=255, width=width, joint=joint)
    return mask, rim


def _pattern(thing: Thing, side: int, centre: np.ndarray, full_side: int, rng: np.random.Generator) -> np.ndarray:
    """True where the pattern's colour goes; the pattern's period grows a little with the thing."""
    # In periods. As little as possible is computed of the whole plane: this is where most of the time would go.
    period = full_side * (0.095 + 0.07 * thing.size)
    x, y = ((np.arange(side, dtype=np.float32) - float(start)) / period + rng.uniform(0, 1) for start in centre)
    y = y[:, None]
    if thing.texture == "striped":
        angle = math.radians(rng.uniform(35, 55))
        return _fraction(x * math.cos(angle) + y * math.sin(angle)) < 0.45
    if thing.texture == "checkered":
        return (np.floor(x / 0.75) % 2) != (np.floor(y / 0.75) % 2)
    if thing.texture == "zigzag":
        return _fraction(y / 1.2 + np.abs(x % 1.5 - 0.75) / 1.2) < 0.42
    if thing.texture == "speckled":
        cells = np.arange(side) * 40 // full_side
        return (rng.random((cells[-1] + 1,) * 2) < 0.3)[np.ix_(cells, cells)]
    if thing.texture == "halved":
        return np.tile((np.arange(side) < centre[0]) == (rng.random() < 0.5), (side, 1))
    row = np.floor(y / 0.87)
    down = y - 0.87 * row - 0.435
    across = np.stack([_fraction(x), _fraction(x + 0.5)])[row[:, 0].astype(int) % 2] - 0.5
    return across**2 + down**2 < 0.29**2


def _fraction(numbers: np.ndarray) -> np.ndarray:
    return numbers - np.floor(numbers)


def _ellipse(x: float = 0, y: float = 0, radius: float = 1, points: int = 48) -> Polygon:
    turns = (2 * math.pi * k / points for k in range(points))
    return [(x + radius * math.cos(turn), y + radius * math.sin(turn)) for turn in turns]


def _star(points: int = 5, inner: float = 0.46) -> Polygon:
    corners = []
    for k in range(2 * points):
        radius, turn = (inner if k % 2 else 1.06), math.pi * k / points
        corners.append((radius * math.sin(turn), 0.08 - radius * math.cos(turn)))
    return corners


def _heart() -> Polygon:
    turns = (2 * math.pi * k / 60 for k in range(60))
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.12,
        )
        for t in turns
    ]


def _cross(arm: float = 0.34) -> Polygon:
    corner = [(arm, -1), (arm, -arm), (1, -arm)]
    turned = []
    for _ in range(4):
        turned += corner
        corner = [(-y, x) for x, y in corner]
    return turned


# In a box from -1 to 1, y pointing down.
OUTLINES: dict[str, list[Polygon]] = {
    "circle": [_ellipse(radius=0.95)],
    "square": [[(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]],
    "triangle": [[(0, -0.92), (1, 0.82), (-1, 0.82)]],
    "star": [_star()],
    "heart": [_heart()],
    "ring": [_ellipse(), _ellipse(radius=0.5)],
    "cross": [_cross()],
    "diamond": [[(0, -1.05), (0.74, 0), (0, 1.05), (-0.74, 0)]],
}
