//! The loss over the steps, as a picture.

use std::io;

use plotters::prelude::{
    BLUE, ChartBuilder, Color, IntoDrawingArea, IntoFont, LineSeries, PathElement, RED, SVGBackend,
    WHITE,
};

use super::Point;

/// Width and height in pixels.
const SIZE: (u32, u32) = (800, 480);

/// Training and validation loss as an SVG.
pub(super) fn draw(points: &[Point]) -> io::Result<String> {
    let mut svg = String::new();
    draw_to(&mut svg, points).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(svg)
}

fn draw_to(svg: &mut String, points: &[Point]) -> Result<(), Box<dyn std::error::Error>> {
    let train = points.iter().map(|point| (point.step as f64, point.train_loss));
    let validation =
        points.iter().filter_map(|point| Some((point.step as f64, point.validation_loss?)));
    let values = train.clone().chain(validation.clone()).map(|(_, loss)| loss);
    let (low, high) = values
        .filter(|loss| loss.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), loss| {
            (low.min(loss), high.max(loss))
        });
    let (low, high) = if low < high { (low, high) } else { (0.0, 1.0) };
    let margin = 0.05 * (high - low);
    let last = points.last().map_or(1.0, |point| point.step as f64);

    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..last, low - margin..high + margin)?;
    let font = ("sans-serif", 14).into_font();
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("loss, nats a token")
        .label_style(font.clone())
        .axis_desc_style(font.clone())
        .draw()?;
    let legend = |color| move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color);
    chart.draw_series(LineSeries::new(train, &BLUE))?.label("training").legend(legend(BLUE));
    chart.draw_series(LineSeries::new(validation, &RED))?.label("validation").legend(legend(RED));
    chart.configure_series_labels().label_font(font).background_style(WHITE.mix(0.8)).draw()?;
    root.present()?;
    Ok(())
}
