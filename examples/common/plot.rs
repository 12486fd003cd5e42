//! A picture of a run.

use super::files;
use anyhow::Result;
use plotters::prelude::*;
use std::path::Path;

/// The curves of (step, loss) as an SVG.
pub fn draw(path: &Path, train: &[(usize, f64)], validation: &[(usize, f64)]) -> Result<()> {
    let all = || train.iter().chain(validation).map(|&(_, loss)| loss);
    let (low, high) = (
        all().fold(f64::INFINITY, f64::min).floor(),
        all().fold(0., f64::max).ceil(),
    );
    // The axis of a curve without height has one.
    let high = high.max(low + 1.);
    let mut picture = String::new();
    let root = SVGBackend::with_string(&mut picture, (720, 400)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(52)
        .build_cartesian_2d(0..train.len(), low..high)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("loss")
        .light_line_style(TRANSPARENT)
        .y_label_formatter(&|loss| format!("{loss:.1}"))
        .label_style(("sans-serif", 14))
        .axis_desc_style(("sans-serif", 16))
        .draw()?;
    for (name, curve, colour) in [
        ("train", train, RGBColor(31, 119, 180)),
        ("validation", validation, RGBColor(255, 127, 14)),
    ] {
        chart
            .draw_series(LineSeries::new(
                curve.iter().copied(),
                colour.stroke_width(2),
            ))?
            .label(name)
            .legend(move |(x, y)| {
                PathElement::new(vec![(x, y), (x + 20, y)], colour.stroke_width(2))
            });
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(16)
        .border_style(WHITE)
        .label_font(("sans-serif", 16))
        .draw()?;
    root.present()?;
    drop((chart, root));
    files::replace(path, picture.as_bytes())
}
