//! Draws the chart of the results: four panels, each with one line per contender.

use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::ranged1d::ValueFormatter;
use plotters::coord::types::RangedCoordi32 as Widths;
use plotters::prelude::*;

use crate::Result;
use crate::plan::Part;
use crate::report::Row;
use crate::sample::Sample;

const SIZE: (u32, u32) = (1000, 760);

const COLOURS: [RGBColor; 5] = [
    RGBColor(120, 120, 120),
    RGBColor(214, 137, 16),
    RGBColor(41, 98, 180),
    RGBColor(192, 57, 43),
    RGBColor(30, 132, 73),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The content of one panel, with a line for each contender.
struct Panel<'a> {
    title: &'static str,
    labels: Vec<String>,
    lines: Vec<(&'a str, Vec<f64>)>,
}

pub(crate) fn draw(path: &Path, parts: &[(Part, &[Row])]) -> Result<()> {
    let panels = panels(parts);
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, panel) in root.split_evenly((2, 2)).iter().zip(&panels) {
        draw_panel(area, panel)?;
    }
    Ok(root.present()?)
}

/// Reports whether the parts have a row for every panel.
pub(crate) fn is_complete(parts: &[(Part, &[Row])]) -> bool {
    panels(parts).len() == 4
}

fn panels<'a>(parts: &[(Part, &'a [Row])]) -> Vec<Panel<'a>> {
    let rows = |wanted| parts.iter().find(|(part, _)| *part == wanted).map(|(_, rows)| *rows).unwrap_or_default();
    let width = |row: &Row| row.at_once.to_string();
    let size = |row: &Row| row.about.clone();
    let by_width: Vec<&Row> = rows(Part::Throughput).iter().filter(|row| row.about == "/bin/true").collect();
    let (payload, output): (Vec<_>, Vec<_>) =
        (rows(Part::Payload).iter().collect(), rows(Part::Output).iter().collect());
    let all = [
        Panel::of("jobs/s of /bin/true, by how many at once", &by_width, width, |sample| sample.jobs_per_second),
        Panel::of("CPU per job with children, ms, by how many at once", &by_width, width, |sample| sample.cpu),
        Panel::of("CPU per job with children, ms, by payload", &payload, size, |sample| sample.cpu),
        Panel::of("CPU per job with children, ms, by output", &output, size, |sample| sample.cpu),
    ];
    all.into_iter().filter(|panel| !panel.labels.is_empty()).collect()
}

impl<'a> Panel<'a> {
    fn of(
        title: &'static str,
        rows: &[&'a Row],
        label: impl Fn(&Row) -> String,
        value: impl Fn(&Sample) -> f64,
    ) -> Self {
        let mut panel = Self { title, labels: Vec::new(), lines: Vec::new() };
        for row in rows {
            if !panel.labels.contains(&label(row)) {
                panel.labels.push(label(row));
            }
            let median = row.spread(|sample| Some(value(sample))).map_or(f64::NAN, |spread| spread.median);
            match panel.lines.iter_mut().find(|(name, _)| *name == row.contender) {
                Some((_, values)) => values.push(median),
                None => panel.lines.push((&row.contender, vec![median])),
            }
        }
        panel
    }

    fn most(&self) -> f64 {
        self.lines.iter().flat_map(|(_, values)| values).copied().fold(0.0, f64::max)
    }

    fn least(&self) -> f64 {
        self.lines.iter().flat_map(|(_, values)| values).copied().fold(f64::MAX, f64::min)
    }

    fn label(&self, index: i32) -> String {
        usize::try_from(index).ok().and_then(|index| self.labels.get(index)).cloned().unwrap_or_default()
    }
}

fn draw_panel(area: &Area<'_>, panel: &Panel<'_>) -> Result<()> {
    let widths = 0..i32::try_from(panel.labels.len())? - 1;
    let mut builder = ChartBuilder::on(area);
    builder.caption(panel.title, ("sans-serif", 17)).margin(14).x_label_area_size(28).y_label_area_size(52);
    // Values that span more than a factor of twenty need a logarithmic scale.
    if panel.most() > 20.0 * panel.least() {
        let heights = (panel.least() * 0.7..panel.most() * 1.5).log_scale();
        draw_lines(builder.build_cartesian_2d(widths, heights)?, panel)
    } else {
        draw_lines(builder.build_cartesian_2d(widths, 0.0..panel.most() * 1.25)?, panel)
    }
}

fn draw_lines<'a, Y>(
    mut chart: ChartContext<'a, SVGBackend<'a>, Cartesian2d<Widths, Y>>,
    panel: &Panel<'_>,
) -> Result<()>
where
    Y: Ranged<ValueType = f64> + ValueFormatter<f64> + 'static,
{
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .x_labels(panel.labels.len())
        .x_label_formatter(&|index| panel.label(*index))
        .label_style(("sans-serif", 13))
        .draw()?;
    for ((name, values), colour) in panel.lines.iter().zip(COLOURS) {
        let points = (0..).zip(values.iter().copied());
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)).point_size(3))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .label_font(("sans-serif", 13))
        .draw()?;
    Ok(())
}
