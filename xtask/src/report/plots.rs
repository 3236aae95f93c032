//! The plots, as SVG for a light or a dark page.

use std::ops::Range;

use anyhow::{Result, anyhow};
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

use super::gather::Compared;
use super::memory::Curve;
use super::training::Training;

/// Small enough that the text can be read where the plot is as wide as a phone.
const SIZE: (u32, u32) = (460, 340);
/// Drawn in it, and shown in the color of the text.
const INK: RGBColor = BLACK;
/// Readable on white and on black.
const COLORS: [RGBColor; 8] = [
    RGBColor(0x2f, 0x81, 0xd6),
    RGBColor(0xd9, 0x6b, 0x27),
    RGBColor(0x2f, 0x9e, 0x64),
    RGBColor(0xb0, 0x5c, 0xc4),
    RGBColor(0xc9, 0x4a, 0x4a),
    RGBColor(0x8a, 0x84, 0x2e),
    RGBColor(0x3a, 0x9f, 0xa6),
    RGBColor(0x8a, 0x8f, 0x98),
];

/// Each case under the roof that the machine's arithmetic and memory put over it (Williams, Waterman
/// and Patterson, 2009).
pub(super) fn roofline(compared: &Compared) -> Result<String> {
    let (peak, bandwidth) = (compared.machine.peak_gflops, compared.machine.read_gb_s);
    let rows: Vec<_> =
        compared.rows.iter().filter(|row| row.gflops > 0.0 && row.gb_s > 0.0).collect();
    let intensities = rows.iter().map(|row| row.gflops / row.gb_s);
    let x = span(intensities.chain([peak / bandwidth]));
    let y = span(rows.iter().map(|row| row.gflops).chain([peak]));
    let mut kernels: Vec<_> = rows.iter().map(|row| row.kernel.as_str()).collect();
    kernels.dedup();
    let legend = SeriesLabelPosition::LowerRight;
    draw(x.clone().log_scale(), y.log_scale(), "operations a byte", "GFLOP/s", legend, |chart| {
        let roof = |intensity: f64| (intensity, peak.min(bandwidth * intensity));
        let corner = peak / bandwidth;
        let line = [x.start, corner.clamp(x.start, x.end), x.end].map(roof);
        chart.draw_series(LineSeries::new(line, INK.stroke_width(2)))?;
        for (kernel, &color) in kernels.iter().zip(COLORS.iter().cycle()) {
            let points = rows.iter().filter(|row| row.kernel == *kernel);
            let dots = points
                .map(|row| Circle::new((row.gflops / row.gb_s, row.gflops), 4, color.filled()));
            let series = chart.draw_series(dots)?;
            series.label(*kernel).legend(move |at| Circle::new(at, 4, color.filled()));
        }
        Ok(())
    })
}

/// Memory over length.
pub(super) fn curve(curve: &Curve) -> Result<String> {
    let megabytes = |bytes: usize| bytes as f64 / 1e6;
    let line = |bytes: fn(&super::memory::Point) -> Option<usize>| -> Vec<(f64, f64)> {
        let points = curve.points.iter();
        points
            .filter_map(|point| Some((point.length as f64, megabytes(bytes(point)?).max(1e-4))))
            .collect()
    };
    let series = [
        ("this kernel, measured", line(|point| Some(point.ours))),
        ("naive, measured", line(|point| point.naive)),
        ("N x N matrices, computed", line(|point| Some(point.matrices))),
    ];
    let all = || series.iter().flat_map(|(_, points)| points.iter());
    let (x, y) = (span(all().map(|point| point.0)), span(all().map(|point| point.1)));
    let legend = SeriesLabelPosition::UpperLeft;
    draw(x.log_scale(), y.log_scale(), "length of the sequence", "MB", legend, |chart| {
        for ((label, points), &color) in series.iter().zip(&COLORS) {
            let drawn =
                LineSeries::new(points.iter().copied(), color.stroke_width(2)).point_size(3);
            let drawn = chart.draw_series(drawn)?;
            drawn.label(*label).legend(move |at| Circle::new(at, 4, color.filled()));
        }
        Ok(())
    })
}

/// Validation losses over steps; nothing without a training.
pub(super) fn losses(trainings: &[Training]) -> Result<Option<String>> {
    if trainings.iter().all(|training| training.curve.is_empty()) {
        return Ok(None);
    }
    let points = |training: &Training| -> Vec<(f64, f64)> {
        training.curve.iter().map(|&(step, loss)| (step as f64, loss)).collect()
    };
    let all = || trainings.iter().flat_map(points);
    let steps = all().map(|point| point.0).fold(1.0, f64::max);
    let (low, high) = extremes(all().map(|point| point.1));
    let y = (10.0 * low).floor() / 10.0..(10.0 * high).ceil() / 10.0;
    draw(0.0..steps, y, "step", "nats a token", SeriesLabelPosition::UpperRight, |chart| {
        for (training, &color) in trainings.iter().zip(COLORS.iter().cycle()) {
            let line = LineSeries::new(points(training), color.stroke_width(2)).point_size(2);
            let label = format!("{}, {}", training.name, training.weights);
            let drawn = chart.draw_series(line)?;
            drawn.label(label).legend(move |at| Circle::new(at, 4, color.filled()));
        }
        Ok(())
    })
    .map(Some)
}

type Chart<'a, 'b, X, Y> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<X, Y>>;
type Drawn = Result<(), DrawingAreaErrorKind<<SVGBackend<'static> as DrawingBackend>::ErrorType>>;

/// A plot with a legend; the axes say whether they are logarithmic.
fn draw<X, Y>(
    x: X,
    y: Y,
    x_label: &str,
    y_label: &str,
    legend: SeriesLabelPosition,
    series: impl FnOnce(&mut Chart<'_, '_, X::CoordDescType, Y::CoordDescType>) -> Drawn,
) -> Result<String>
where
    X: AsRangedCoord<Value = f64>,
    Y: AsRangedCoord<Value = f64>,
    X::CoordDescType: ValueFormatter<f64>,
    Y::CoordDescType: ValueFormatter<f64>,
{
    let mut text = String::new();
    let failed = |error: &dyn std::fmt::Display| anyhow!("a plot cannot be drawn: {error}");
    {
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .x_label_area_size(42)
            .y_label_area_size(56)
            .build_cartesian_2d(x, y)
            .map_err(|error| failed(&error))?;
        chart
            .configure_mesh()
            .disable_mesh()
            .axis_style(INK)
            .label_style(("sans-serif", 13).into_font().color(&INK))
            .axis_desc_style(("sans-serif", 14).into_font().color(&INK))
            .x_desc(x_label)
            .y_desc(y_label)
            .x_label_formatter(&tick)
            .y_label_formatter(&tick)
            .draw()
            .map_err(|error| failed(&error))?;
        series(&mut chart).map_err(|error| failed(&error))?;
        chart
            .configure_series_labels()
            .position(legend)
            .label_font(("sans-serif", 13).into_font().color(&INK))
            .draw()
            .map_err(|error| failed(&error))?;
        area.present().map_err(|error| failed(&error))?;
    }
    Ok(themed(&text))
}

/// As wide as the page lets it, and in the color of the text.
fn themed(svg: &str) -> String {
    let (width, height) = SIZE;
    let fixed = format!(r#"width="{width}" height="{height}" "#);
    svg.replacen(&fixed, r#"role="img" "#, 1).replace("#000000", "currentColor")
}

fn tick(value: &f64) -> String {
    if *value >= 10.0 { format!("{value:.0}") } else { format!("{}", (value * 1e4).round() / 1e4) }
}

/// The powers of two around the values.
fn span(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = extremes(values);
    if low > high {
        return 1.0..10.0;
    }
    (low / 1.6).log2().floor().exp2()..(high * 1.6).log2().ceil().exp2()
}

/// The smallest and the largest of numbers that are not negative.
fn extremes(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::MAX, 0.0), |(low, high), x| (low.min(x), high.max(x)))
}
