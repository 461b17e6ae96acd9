//! A chart over time, drawn by `plotters`.
//!
//! Values are scaled to the unit that fits the greatest, so that the marks on the axis are round numbers.

use std::time::Duration;

use plotters::prelude::*;
use plotters::style::Color as _;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::style::Color;
use crate::svg::WIDTH;
use crate::text::number;

/// Numbers of marks are this part of the axis apart at least.
const LABEL_DISTANCE: f64 = 0.02;

/// The height of a chart.
const HEIGHT: u32 = 250;

/// A chart that cannot be drawn.
#[derive(Debug, thiserror::Error)]
#[error("draw: {0}")]
pub struct PictureError(String);

/// In what values are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Bytes,
    BytesPerSecond,
}

impl Unit {
    /// The unit for values up to `most`, and how much one of it is.
    fn fitting(self, most: f64) -> (String, f64) {
        let names = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        let mut one = 1.0;
        let mut at = 0;
        while most / one >= 1000.0 && at + 1 < names.len() {
            one *= 1024.0;
            at += 1;
        }
        let per = if self == Self::BytesPerSecond { "/s" } else { "" };
        (format!("{}{per}", names[at]), one)
    }
}

/// Values over time.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) name: &'static str,
    pub(crate) color: Color,
    /// Seconds, and the value.
    pub(crate) points: Vec<(f64, f64)>,
    /// Whether the area below is filled.
    pub(crate) filled: bool,
}

/// What stands along the axis of time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TimeAxis {
    end: f64,
    one: f64,
    name: &'static str,
}

impl TimeAxis {
    /// From 0 to `end`.
    pub(crate) fn to(end: Duration) -> Self {
        let end = end.as_secs_f64().max(1e-3);
        let (one, name) = match end {
            end if end < 1.0 => (1e-3, "ms"),
            end if end < 300.0 => (1.0, "seconds"),
            end if end < 3.0 * 3600.0 => (60.0, "minutes"),
            _ => (3600.0, "hours"),
        };
        Self { end, one, name }
    }
}

/// The chart of `lines`, with a mark at each of `marks`. Empty without a value.
pub(crate) fn chart(
    unit: Unit,
    time: TimeAxis,
    lines: &[Line],
    marks: &[f64],
) -> Result<String, PictureError> {
    let values = || lines.iter().flat_map(|line| line.points.iter().map(|(_, value)| *value));
    let Some(most) = values().reduce(f64::max) else { return Ok(String::new()) };
    let (unit, one) = unit.fitting(most);
    let top = (most / one * 1.08).max(1e-3);
    let mut svg = String::new();
    draw(&mut svg, &unit, (time, top), &scaled(lines, time.one, one), marks)
        .map_err(|error| PictureError(error.to_string()))?;
    // The page has the style sheet.
    Ok(svg)
}

fn scaled(lines: &[Line], time: f64, one: f64) -> Vec<Line> {
    let scale = |line: &Line| {
        let points = line.points.iter().map(|(at, value)| (at / time, value / one)).collect();
        Line { points, ..line.clone() }
    };
    lines.iter().map(scale).collect()
}

type Failure = DrawingAreaErrorKind<<SVGBackend<'static> as DrawingBackend>::ErrorType>;

fn draw(
    svg: &mut String,
    unit: &str,
    (time, top): (TimeAxis, f64),
    lines: &[Line],
    marks: &[f64],
) -> Result<(), Failure> {
    let area = SVGBackend::with_string(svg, (WIDTH, HEIGHT)).into_drawing_area();
    let note = ("sans-serif", 16).into_font().color(&Color::Muted.rgb());
    let mut chart = ChartBuilder::on(&area)
        .margin_top(22)
        .margin_right(16)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..time.end / time.one, 0.0..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(Color::Grid.rgb())
        .light_line_style(Color::Paper.rgb())
        .max_light_lines(0)
        .axis_style(Color::Muted.rgb())
        .x_labels(8)
        .y_labels(5)
        .x_label_formatter(&|value| number(*value))
        .y_label_formatter(&|value| number(*value))
        .label_style(note.clone())
        .axis_desc_style(note)
        .x_desc(time.name)
        .y_desc(unit)
        .draw()?;
    let mut labelled = f64::NEG_INFINITY;
    for (mark, number) in marks.iter().zip(1..) {
        let at = mark / time.one;
        let style = Color::Warning.rgb().stroke_width(1);
        chart.draw_series(LineSeries::new([(at, 0.0), (at, top)], style))?;
        // Numbers that would stand on each other are left out.
        if mark - labelled >= time.end * LABEL_DISTANCE {
            labelled = *mark;
            let style = ("sans-serif", 16).into_font().color(&Color::Warning.rgb());
            let style = style.pos(Pos::new(HPos::Center, VPos::Bottom));
            chart.draw_series([Text::new(number.to_string(), (at, top), style)])?;
        }
    }
    for line in lines {
        let color = line.color.rgb();
        let points = || line.points.iter().copied();
        if line.filled {
            chart.draw_series(AreaSeries::new(points(), 0.0, color.mix(0.18)))?;
        }
        chart.draw_series(LineSeries::new(points(), color.stroke_width(2)))?;
    }
    area.present()
}
