"""Pictures for light and for dark pages, as SVG: what docs/make_pictures.py draws on."""

from __future__ import annotations

from html import escape

WIDTH = 720
LIGHT = {
    "ink": "#22262b", "faint": "#6b7280", "line": "#b9c0ca", "empty": "#e6e9ee", "kept": "#1f6fb2", "other": "#c9770f",
    "third": "#2e7d4f", "paper": "#ffffff",
}  # fmt: skip
DARK = {
    "ink": "#e6eaf0", "faint": "#a3adbd", "line": "#566073", "empty": "#343b4a", "kept": "#5aa9e6", "other": "#eda93f",
    "third": "#6cc08b", "paper": "#1e2129",
}  # fmt: skip


class Canvas:
    """SVG of one picture; colours are names of a palette."""

    def __init__(self, palette: dict[str, str], height: int, title: str) -> None:
        self.palette, self.height, self.title = palette, height, title
        self.parts: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, fill: str, **more: str | float) -> None:
        self._add("rect", x=x, y=y, width=width, height=height, fill=fill, **more)

    def line(self, *points: tuple[float, float], stroke: str = "line", width: float = 1.5, **more: str | float) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._add("polyline", points=path, fill="none", stroke=stroke, stroke_width=width, **more)

    def polygon(self, *points: tuple[float, float], fill: str, **more: str | float) -> None:
        self._add("polygon", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), fill=fill, **more)

    def dot(self, x: float, y: float, radius: float, fill: str) -> None:
        self._add("circle", cx=x, cy=y, r=radius, fill=fill)

    def text(
        self,
        x: float,
        y: float,
        said: str,
        fill: str = "ink",
        size: int = 14,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" fill="{self.palette[fill]}" font-size="{size}" text-anchor="{anchor}"'
            f"{weight}>{escape(said)}</text>"
        )

    def arrow(self, x: float, y: float, to: float, stroke: str = "faint") -> None:
        self.line((x, y), (to - 7, y), stroke=stroke)
        self.polygon((to, y), (to - 8, y - 4.5), (to - 8, y + 4.5), fill=stroke)

    def _add(self, tag: str, **attributes: str | float) -> None:
        written = []
        for name, value in attributes.items():
            shown = f"{value:.1f}" if isinstance(value, float) else self.palette.get(str(value), value)
            written.append(f'{name.replace("_", "-")}="{shown}"')
        self.parts.append(f"<{tag} {' '.join(written)}/>")

    def svg(self) -> str:
        fonts = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
            f'height="{self.height}" role="img" font-family="{fonts}">'
        )
        return "\n".join([head, f"<title>{escape(self.title)}</title>", *self.parts, "</svg>", ""])
