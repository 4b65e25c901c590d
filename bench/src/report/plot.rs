//! Curves as SVG.
//!
//! Each plot is drawn twice, wide and narrow, and the page's style shows the one that fits: scaled
//! down, letters would be too small to read on a telephone. Colours of letters and lines of the
//! grid are stand-ins that become the page's own, so that a plot is legible on a light page and on
//! a dark one.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::ranged1d::ValueFormatter;
use plotters::prelude::*;

/// Width and height on a desktop and on a telephone, in pixels.
const SIZES: [(u32, u32, &str); 2] = [(860, 340, "wide"), (340, 300, "narrow")];

/// Stands for the page's colour of letters.
const INK: RGBColor = RGBColor(1, 2, 3);
/// Stands for the page's colour of the grid.
const GRID: RGBColor = RGBColor(4, 5, 6);

/// Told apart also by who sees no red or no green, the first six of them, and legible on white and
/// on black (after Okabe and Ito).
pub const COLOURS: [RGBColor; 12] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(180, 140, 0),
    RGBColor(86, 150, 233),
    RGBColor(140, 86, 75),
    RGBColor(127, 127, 127),
    RGBColor(148, 103, 189),
    RGBColor(105, 150, 20),
    RGBColor(227, 90, 120),
    RGBColor(20, 160, 180),
];

/// Points on a line, with a name.
#[derive(Debug, Clone)]
pub struct Line {
    /// Its name.
    pub name: String,
    /// Its points.
    pub points: Vec<(f64, f64)>,
}

/// How an axis counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Evenly, from nothing.
    Even,
    /// By powers of ten.
    Powers,
    /// `log10(1 / (1 - share))`: 90 %, 99 % and 99.9 % are equally far apart.
    Nines,
}

/// Axes of a plot.
#[derive(Debug, Clone, Copy)]
pub struct Axes<'a> {
    /// Name and unit of the horizontal one.
    pub x: &'a str,
    /// How it counts.
    pub x_scale: Scale,
    /// Name and unit of the vertical one.
    pub y: &'a str,
    /// How it counts.
    pub y_scale: Scale,
}

/// The plot as two SVG elements and its legend; nothing where there is nothing to draw.
pub fn lines(axes: &Axes<'_>, lines: &[Line]) -> Result<String> {
    let scaled: Vec<Line> = lines
        .iter()
        .map(|line| Line {
            name: line.name.clone(),
            points: line
                .points
                .iter()
                .map(|(x, y)| (place(axes.x_scale, *x), place(axes.y_scale, *y)))
                .filter(|(x, y)| x.is_finite() && y.is_finite())
                .collect(),
        })
        .filter(|line| !line.points.is_empty())
        .collect();
    if scaled.is_empty() {
        return Ok(String::new());
    }
    let mut html = legend(scaled.iter().map(|line| line.name.as_str()));
    for (width, height, class) in SIZES {
        let mut svg = String::new();
        {
            let area = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
            draw(&area, width, axes, &scaled).map_err(|e| anyhow!("drawing a plot: {e}"))?;
            area.present().map_err(|e| anyhow!("drawing a plot: {e}"))?;
        }
        html += &dress(&svg, class);
    }
    Ok(html)
}

/// The names with their colours, as a list of the page: it wraps where the page is narrow.
fn legend<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let entry = |(place, name): (usize, &str)| {
        let RGBColor(r, g, b) = COLOURS[place % COLOURS.len()];
        format!(
            "<li><span style=\"background:rgb({r},{g},{b})\"></span>{}</li>",
            super::escape(name)
        )
    };
    format!("<ul class=\"legend\">{}</ul>", names.enumerate().map(entry).collect::<String>())
}

fn draw(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    width: u32,
    axes: &Axes<'_>,
    lines: &[Line],
) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
    let all = || lines.iter().flat_map(|line| line.points.iter().copied());
    let x = bounds(axes.x_scale, all().map(|point| point.0));
    let y = bounds(axes.y_scale, all().map(|point| point.1));
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .margin_right(24)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(
            Axis { range: x, scale: axes.x_scale },
            Axis { range: y, scale: axes.y_scale },
        )?;
    chart
        .configure_mesh()
        .disable_mesh()
        .x_desc(axes.x)
        .y_desc(axes.y)
        .x_labels(if width < 500 { 4 } else { 9 })
        .y_labels(6)
        .axis_style(GRID)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .label_style(("sans-serif", 13).into_font().color(&INK))
        .axis_desc_style(("sans-serif", 14).into_font().color(&INK))
        .draw()?;
    for (place, line) in lines.iter().enumerate() {
        let style = COLOURS[place % COLOURS.len()].stroke_width(2);
        if let [point] = line.points.as_slice() {
            chart.draw_series([Circle::new(*point, 3, style)])?;
        } else {
            chart.draw_series(LineSeries::new(line.points.iter().copied(), style))?;
        }
    }
    Ok(())
}

/// Where a value lies on an axis.
fn place(scale: Scale, value: f64) -> f64 {
    match scale {
        Scale::Even => value,
        Scale::Powers => value.log10(),
        // The last sample has nothing above it, and no place.
        Scale::Nines => -(1.0 - value / 100.0).log10(),
    }
}

fn bounds(scale: Scale, values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    match scale {
        Scale::Even => (low.min(0.0), if high > 0.0 { high * 1.05 } else { 1.0 }),
        Scale::Powers => (low.floor(), high.ceil().max(low.floor() + 1.0)),
        Scale::Nines => (0.0, high.max(1.0) * 1.02),
    }
}

/// An axis whose labels say the value, not its place.
struct Axis {
    range: (f64, f64),
    scale: Scale,
}

impl Ranged for Axis {
    type FormatOption = plotters::coord::ranged1d::NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let share = (value - self.range.0) / (self.range.1 - self.range.0);
        (f64::from(limit.0) + f64::from(limit.1 - limit.0) * share).round() as i32
    }

    fn key_points<Hint: plotters::coord::ranged1d::KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        match self.scale {
            Scale::Even => steps(self.range, hint.max_num_points()),
            // Powers of ten, and every nine.
            Scale::Powers => (self.range.0 as i32..=self.range.1 as i32).map(f64::from).collect(),
            Scale::Nines => [50.0, 90.0, 99.0, 99.9, 99.99]
                .map(|percent| place(Scale::Nines, percent))
                .into_iter()
                .filter(|at| *at <= self.range.1)
                .collect(),
        }
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.range.0..self.range.1
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, at: &f64) -> String {
        match self.scale {
            Scale::Even => trim(*at),
            Scale::Powers => trim(10f64.powf(*at)),
            Scale::Nines => format!("{} %", trim(100.0 * (1.0 - 10f64.powf(-at)))),
        }
    }
}

/// At most so many round values within a range.
fn steps((low, high): (f64, f64), most: usize) -> Vec<f64> {
    let raw = (high - low) / most.max(1) as f64;
    let power = 10f64.powf(raw.log10().floor());
    let step =
        [1.0, 2.0, 5.0, 10.0].map(|n| n * power).into_iter().find(|s| *s >= raw).unwrap_or(raw);
    let first = (low / step).ceil() as i64;
    (first..).map(|n| n as f64 * step).take_while(|at| *at <= high).take(most + 2).collect()
}

/// A number without digits that say nothing.
fn trim(value: f64) -> String {
    let text = format!("{value:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

/// Puts the page's colours in place of the stand-ins.
fn dress(svg: &str, class: &str) -> String {
    svg.replace("#010203", "currentColor").replace("#040506", "var(--grid)").replacen(
        "<svg ",
        &format!("<svg class=\"{class}\" role=\"img\" "),
        1,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_round_and_few() {
        assert_eq!(steps((0.0, 10.5), 6), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert!(steps((0.0, 0.0123), 9).len() <= 11);
        assert_eq!([0.5, 100.0, 0.0, 99.9].map(trim), ["0.5", "100", "0", "99.9"]);
    }

    #[test]
    fn a_plot_has_its_line_in_both_sizes_and_no_stand_in_colour() {
        let axes = Axes { x: "percent", x_scale: Scale::Nines, y: "ms", y_scale: Scale::Even };
        let line =
            Line { name: "a < b".into(), points: vec![(0.0, 1.0), (90.0, 2.0), (100.0, 3.0)] };
        let html = lines(&axes, &[line]).unwrap();
        assert_eq!(
            (html.matches("<svg").count(), html.matches("<polyline").count() >= 2),
            (2, true)
        );
        assert!(
            html.contains("a &lt; b") && html.contains("currentColor") && !html.contains("#010203")
        );
        assert!(html.contains("90 %") && html.contains("percent"));
        assert_eq!(lines(&axes, &[]).unwrap(), "");
    }

    #[test]
    fn one_value_or_none_above_zero_still_has_axes() {
        for points in [vec![(0.0, 0.0)], vec![(1.0, 1.0)], vec![(5.0, 5.0), (5.0, 5.0)]] {
            for scale in [Scale::Even, Scale::Powers] {
                let axes = Axes { x: "x", x_scale: scale, y: "y", y_scale: Scale::Even };
                assert!(
                    lines(&axes, &[Line { name: "one".into(), points: points.clone() }]).is_ok()
                );
            }
        }
    }
}
