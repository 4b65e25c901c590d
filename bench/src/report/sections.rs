//! The parts of the page. One for which a record has nothing is empty.

use super::escape;
use super::plot::{Axes, COLOURS, Line, Scale, lines};
use crate::record::show::digits;
use crate::record::{Figure, Migration, Record};
use crate::stats::bootstrap::{self, LEVEL};
use crate::stats::histogram::PERCENTILES;
use anyhow::Result;
use plotters::style::RGBColor;
use std::fmt::Write;

/// The slices of a downtime, in the order in which they follow one another.
const SLICES: [&str; 7] = ["pause", "sync", "push", "save", "load", "commit", "resume"];

/// Times longer than this many times their median would press all others to the axis.
const STRETCH_MAX: f64 = 20.0;

pub(super) fn section(title: &str, body: &str) -> String {
    if body.is_empty() {
        String::new()
    } else {
        format!("<section>\n<h2>{title}</h2>\n{body}</section>\n")
    }
}

pub(super) fn table(head: &[&str], rows: &str) -> String {
    let head: String = head.iter().map(|word| format!("<th>{word}</th>")).collect();
    format!(
        "<div class=\"scroll\"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n"
    )
}

pub(super) fn failures(record: &Record) -> String {
    let row = |f: &crate::record::Failure| {
        format!(
            "<tr><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&f.group),
            f.turn + 1,
            escape(&f.why)
        )
    };
    if record.failures.is_empty() {
        return String::new();
    }
    let rows: String = record.failures.iter().map(row).collect();
    section("<span class=\"failed\">What failed</span>", &table(&["what", "turn", "why"], &rows))
}

/// The figures that the run was made for, and beside them how they compare with those of the first
/// group.
pub(super) fn headlines(record: &Record) -> Result<String> {
    // Places of a map or of a check are no ways that are compared.
    let ways = record.maps.is_empty() && record.tables.is_empty();
    let several =
        ways && record.figures.iter().any(|f| f.headline && f.group != record.figures[0].group);
    let mut rows = String::new();
    for figure in record.figures.iter().filter(|f| f.headline) {
        let first = record
            .figures
            .iter()
            .find(|f| f.name == figure.name)
            .filter(|f| f.group != figure.group);
        write!(
            rows,
            "<tr>{}{}",
            cells(figure),
            if several { ratio(figure, first) } else { String::new() }
        )?;
        rows += "</tr>";
    }
    let mut head = vec!["what", "", "median", "95 %", "smallest", "largest", "turns"];
    if several {
        head.push("of the first");
    }
    Ok(if rows.is_empty() { rows } else { section("Figures", &table(&head, &rows)) })
}

fn cells(figure: &Figure) -> String {
    let interval = bootstrap::median(&figure.samples, LEVEL)
        .map_or_else(|| "too few".into(), |i| format!("{} to {}", digits(i.low), digits(i.high)));
    format!(
        "<td>{}</td><td>{}</td><td class=\"n\"><b>{}</b> {}</td><td class=\"n\">{interval}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td>",
        escape(&figure.group),
        escape(&figure.name),
        digits(figure.samples.median()),
        escape(&figure.unit),
        digits(figure.samples.min()),
        digits(figure.samples.max()),
        figure.samples.0.len()
    )
}

fn ratio(figure: &Figure, first: Option<&Figure>) -> String {
    let Some(first) = first else { return "<td></td>".into() };
    let (ours, theirs) = figure.paired(first);
    let middle = ours.median() / theirs.median();
    let interval = bootstrap::ratio_in_turns(&ours, &theirs, LEVEL)
        .map_or_else(String::new, |i| format!(" ({} to {})", digits(i.low), digits(i.high)));
    format!("<td class=\"n\">{}x{interval}</td>", digits(middle))
}

pub(super) fn curves(record: &Record) -> Result<String> {
    let mut html = String::new();
    for plot in &record.curves {
        let scale = |log: bool| if log { Scale::Powers } else { Scale::Even };
        let axes =
            Axes { x: &plot.x, x_scale: scale(plot.x_log), y: &plot.y, y_scale: scale(plot.y_log) };
        let series =
            plot.series.iter().map(|s| Line { name: s.name.clone(), points: s.points.clone() });
        let drawn = lines(&axes, &series.collect::<Vec<_>>())?;
        html += &section(
            &escape(&plot.title),
            &format!("{drawn}<p class=\"quiet\">{}</p>\n", escape(&plot.caption)),
        );
    }
    Ok(html)
}

pub(super) fn tables(record: &Record) -> String {
    let cell = |text: &String| format!("<td>{}</td>", escape(text));
    let row =
        |cells: &Vec<String>| format!("<tr>{}</tr>", cells.iter().map(cell).collect::<String>());
    let one = |t: &crate::record::Table| {
        let head: Vec<String> = t.head.iter().map(|word| escape(word)).collect();
        let head: Vec<&str> = head.iter().map(String::as_str).collect();
        let rows: String = t.rows.iter().map(row).collect();
        let caption = format!("<p class=\"quiet\">{}</p>\n", escape(&t.caption));
        section(&escape(&t.title), &(table(&head, &rows) + &caption))
    };
    record.tables.iter().map(one).collect()
}

pub(super) fn distributions(record: &Record) -> Result<String> {
    if record.distributions.is_empty() {
        return Ok(String::new());
    }
    let several = record.groups().len() > 1;
    let headline = |name: &str| record.figures.iter().any(|f| f.headline && f.name == name);
    // A plot a figure where there are several groups: all in one would hide one another.
    let mut plots: Vec<(&str, Vec<Line>)> = Vec::new();
    let mut rows = String::new();
    for d in &record.distributions {
        write!(rows, "<tr><td>{}</td><td>{}</td>", escape(&d.group), escape(&d.name))?;
        for (percent, ms) in PERCENTILES.iter().zip(&d.percentiles_ms) {
            let value = if d.can_tell(*percent) { digits(*ms) } else { "-".into() };
            write!(rows, "<td class=\"n\">{value}</td>")?;
        }
        write!(
            rows,
            "<td class=\"n\">{}</td><td class=\"n\">{}</td></tr>",
            digits(d.max_ms),
            d.count
        )?;
        // The total is another order of time, and a part is in the whole.
        if d.name != "total"
            && (headline(&d.name) || !record.figures.iter().any(|f| f.name == d.name))
        {
            let (title, name) = if several { (d.name.as_str(), &d.group) } else { ("", &d.name) };
            let mut points =
                vec![(0.0, d.counts_us.first().map_or(0.0, |(us, _)| *us as f64 / 1e3))];
            points.extend(d.curve());
            let line = Line { name: name.clone(), points };
            match plots.iter_mut().find(|plot| plot.0 == title) {
                Some(plot) => plot.1.push(line),
                None => plots.push((title, vec![line])),
            }
        }
    }
    let axes = Axes {
        x: "share of moves, or of requests, that took no longer",
        x_scale: Scale::Nines,
        y: "milliseconds",
        y_scale: Scale::Powers,
    };
    let head = ["what", "", "p50 ms", "p90", "p99", "p99.9", "longest", "of"];
    let plot = titled(&axes, &plots)?;
    let note = "<p class=\"quiet\">A percentile that so few samples cannot tell from the longest is left out.</p>\n";
    Ok(section("Distributions", &format!("{plot}{}{note}", table(&head, &rows))))
}

/// What a downtime is made of, in the median.
pub(super) fn slices(record: &Record) -> String {
    let mut html = String::new();
    for group in record.groups() {
        let parts: Vec<(&str, f64)> = SLICES
            .iter()
            .filter_map(|name| Some((*name, record.figure(group, name)?.samples.median())))
            .collect();
        let all: f64 = parts.iter().map(|part| part.1).sum();
        if all <= 0.0 {
            continue;
        }
        let mut rows = String::new();
        for (place, (name, ms)) in parts.iter().enumerate() {
            let RGBColor(r, g, b) = COLOURS[place % COLOURS.len()];
            let share = ms * 100.0 / all;
            rows += &format!(
                "<tr><td>{name}</td><td class=\"n\">{} ms</td><td class=\"bar\"><span style=\"width:{share:.1}%;background:rgb({r},{g},{b})\"></span></td></tr>",
                digits(*ms)
            );
        }
        html += &format!(
            "<h3>{}</h3><table class=\"bars\"><tbody>{rows}</tbody></table>\n",
            escape(group)
        );
    }
    section("What a downtime is made of (medians of its slices)", &html)
}

/// Whether the machine, or the guest, changed while it was measured.
pub(super) fn turns(record: &Record) -> Result<String> {
    let shown = record
        .figures
        .iter()
        .filter(|f| f.headline && f.name != "total" && f.unit == "ms" && f.turns.len() > 2);
    let mut plots: Vec<(&str, Vec<Line>)> = Vec::new();
    let several = record.groups().len() > 1;
    for f in shown {
        let (title, name) = if several { (f.name.as_str(), &f.group) } else { ("", &f.name) };
        let points =
            f.turns.iter().map(|t| f64::from(t + 1)).zip(f.samples.0.iter().copied()).collect();
        let line = Line { name: name.clone(), points };
        match plots.iter_mut().find(|plot| plot.0 == title) {
            Some(plot) => plot.1.push(line),
            None => plots.push((title, vec![line])),
        }
    }
    let mut all: Vec<f64> = plots
        .iter()
        .flat_map(|plot| &plot.1)
        .flat_map(|line| line.points.iter().map(|p| p.1))
        .collect();
    let highest = all.iter().copied().fold(0.0, f64::max);
    let wide = highest > STRETCH_MAX * crate::stats::median_of(&mut all);
    let y_scale = if wide { Scale::Powers } else { Scale::Even };
    let axes = Axes { x: "turn", x_scale: Scale::Even, y: "milliseconds", y_scale };
    Ok(section("Turn by turn", &titled(&axes, &plots)?))
}

/// One plot after another, each under its title if it has one.
fn titled(axes: &Axes<'_>, plots: &[(&str, Vec<Line>)]) -> Result<String> {
    let mut html = String::new();
    for (title, drawn) in plots {
        if !title.is_empty() {
            writeln!(html, "<h3>{}</h3>", escape(title))?;
        }
        html += &lines(axes, drawn)?;
    }
    Ok(html)
}

/// The migrations in the middle and at the end of the downtimes: rates over time.
pub(super) fn timelines(record: &Record) -> Result<String> {
    let mut moves: Vec<&Migration> =
        record.migrations.iter().filter(|m| !m.report.rounds.is_empty()).collect();
    moves.sort_by_key(|m| m.report.downtime_us.total);
    let Some(longest) = moves.last() else { return Ok(String::new()) };
    let mut html = timeline("With the median downtime", moves[moves.len() / 2])?;
    if moves.len() > 2 {
        html += &timeline("With the longest downtime", longest)?;
    }
    Ok(section("One migration over time", &html))
}

fn timeline(title: &str, migration: &Migration) -> Result<String> {
    let report = &migration.report;
    let (mut sent, mut written, mut at) = (Vec::new(), Vec::new(), 0.0);
    let mut rows = String::new();
    for round in &report.rounds {
        let elapsed = round.elapsed_us.max(1) as f64;
        let end = at + elapsed / 1e3;
        let rate = |bytes: f64| bytes / elapsed;
        let (out, dirtied) = (rate(round.bytes as f64), rate(round.dirtied_pages as f64 * 4096.0));
        sent.extend([(at, out), (end, out)]);
        written.extend([(at, dirtied), (end, dirtied)]);
        at = end;
        write!(
            rows,
            "<tr><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td></tr>",
            round.index,
            digits(elapsed / 1e3),
            digits(round.bytes as f64 / f64::from(1 << 20)),
            round.dirtied_pages,
            digits(round.predicted_downtime_us as f64 / 1e3)
        )?;
    }
    let downtime = report.downtime_us.total as f64 / 1e3;
    // The downtime is where nothing is sent by rounds any more; its place is after the last of
    // them.
    let high = sent.iter().map(|point| point.1).fold(1.0, f64::max);
    let dark = vec![(at, 0.0), (at, high), (at + downtime, high), (at + downtime, 0.0)];
    let named = |name: &str, points: Vec<(f64, f64)>| Line { name: name.into(), points };
    let axes = Axes {
        x: "milliseconds since the first round",
        x_scale: Scale::Even,
        y: "MB/s",
        y_scale: Scale::Even,
    };
    let plot = lines(
        &axes,
        &[
            named("sent", sent),
            named("written by the guest", written),
            named("downtime (only its width counts)", dark),
        ],
    )?;
    let head = ["round", "ms", "MiB sent", "pages written meanwhile", "predicted downtime ms"];
    Ok(format!(
        "<h3>{title}: {} ms, {}, turn {}</h3>\n{plot}{}",
        digits(downtime),
        escape(&migration.group),
        migration.turn + 1,
        table(&head, &rows)
    ))
}

pub(super) fn all_figures(record: &Record) -> String {
    let rows: String = record
        .figures
        .iter()
        .filter(|f| !f.headline)
        .map(|f| format!("<tr>{}</tr>", cells(f)))
        .collect();
    if rows.is_empty() {
        return rows;
    }
    let head = ["what", "", "median", "95 %", "smallest", "largest", "turns"];
    section("Parts and circumstances", &table(&head, &rows))
}

pub(super) fn notes(record: &Record) -> String {
    let notes: String =
        record.notes.iter().map(|note| format!("<p>{}</p>\n", escape(note))).collect();
    section("How to read this", &notes)
}

pub(super) fn circumstances(record: &Record) -> String {
    let host = &record.host;
    let kind = if host.virtual_machine { "virtual machine" } else { "machine" };
    let facts = [
        (
            "machine",
            format!("{kind}, {} cores of {}, {} MiB", host.cores, host.processor, host.memory_mib),
        ),
        ("kernel", host.kernel.clone()),
        ("system", host.system.clone()),
        ("QEMU", host.qemu.clone()),
        ("pageferry", host.pageferry.clone()),
        ("load before", digits(host.load_before)),
        ("options", record.options.to_string()),
    ];
    let rows: String = facts
        .iter()
        .map(|(name, value)| {
            format!("<tr><td>{name}</td><td class=\"long\">{}</td></tr>", escape(value))
        })
        .collect();
    section("Taken on", &format!("<table class=\"facts\"><tbody>{rows}</tbody></table>\n"))
}
