//! A map of two settings: how a migration ends at each pair of them, as SVG. Drawn for a desktop
//! and for a telephone; where a cell is too small for its words they are left to the table below
//! it. An ending is told by a sign besides its colour.

use super::escape;
use super::sections::section;
use crate::record::{Cell, CellEnding, Map, Record};
use std::fmt::Write;

/// Width of the picture and class that the page's style shows it by.
const SIZES: [(usize, &str); 2] = [(860, "wide"), (340, "narrow")];

/// Left of the cells, for the values of the rows; and below them, for those of the columns.
const LEFT: usize = 64;
const BELOW: usize = 44;
const ABOVE: usize = 20;

/// A line of words, and the least width of a cell that takes them.
const LINE: usize = 15;
const WORDS_WIDTH_MIN: usize = 62;

const ENDINGS: [CellEnding; 4] =
    [CellEnding::Converged, CellEnding::Forced, CellEnding::Refused, CellEnding::Failed];

/// All maps of a record.
pub(super) fn maps(record: &Record) -> String {
    record.maps.iter().map(|map| section(&escape(&map.title), &one(map))).collect()
}

/// Colour, sign and words. The colours are told apart by who sees no red or no green, too.
fn look(ending: CellEnding) -> (&'static str, &'static str, &'static str) {
    match ending {
        CellEnding::Converged => ("rgb(0,158,115)", "\u{2713}", "converged"),
        CellEnding::Forced => ("rgb(213,94,0)", "!", "switchover forced"),
        CellEnding::Refused => ("rgb(86,150,233)", "\u{2013}", "refused: the guest stayed"),
        CellEnding::Failed => ("rgb(128,128,128)", "\u{d7}", "failed"),
    }
}

fn one(map: &Map) -> String {
    let used = ENDINGS.iter().filter(|ending| map.cells.iter().any(|cell| cell.ending == **ending));
    let entry = |ending: &CellEnding| {
        let (colour, sign, words) = look(*ending);
        format!("<li><span style=\"background:{colour}\"></span>{sign} {words}</li>")
    };
    let legend: String = used.map(entry).collect();
    let pictures: String = SIZES.iter().map(|(width, class)| picture(map, *width, class)).collect();
    format!(
        "<ul class=\"legend\">{legend}</ul>\n{pictures}<p class=\"quiet\">{}</p>\n{}",
        escape(&map.caption),
        listed(map)
    )
}

fn picture(map: &Map, width: usize, class: &str) -> String {
    let (columns, rows) = (map.columns.len().max(1), map.rows.len().max(1));
    let cell_width = (width - LEFT - 4) / columns;
    let words = cell_width >= WORDS_WIDTH_MIN;
    let lines = map.cells.iter().map(|cell| cell.lines.len()).max().unwrap_or(0);
    let cell_height = if words { LINE * (lines + 1) + 12 } else { 26 };
    let height = ABOVE + cell_height * rows + BELOW;
    let mut svg = format!(
        "<svg class=\"{class}\" role=\"img\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         xmlns=\"http://www.w3.org/2000/svg\" font-family=\"sans-serif\" font-size=\"12\" fill=\"currentColor\">\n\
         <title>{}</title>\n",
        escape(&map.title)
    );
    let mut text = |x: usize, y: usize, anchor: &str, words: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(
            svg,
            "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\">{}</text>",
            escape(words)
        );
    };
    text(0, 12, "start", &map.y);
    text(width - 4, height - 6, "end", &map.x);
    for (row, name) in map.rows.iter().enumerate() {
        text(LEFT - 8, ABOVE + row * cell_height + cell_height / 2 + 4, "end", name);
    }
    for (column, name) in map.columns.iter().enumerate() {
        text(
            LEFT + column * cell_width + cell_width / 2,
            ABOVE + rows * cell_height + 16,
            "middle",
            name,
        );
    }
    for cell in map.cells.iter().filter(|cell| cell.at.0 < columns && cell.at.1 < rows) {
        let (left, top) = (LEFT + cell.at.0 * cell_width, ABOVE + cell.at.1 * cell_height);
        let (colour, sign, _) = look(cell.ending);
        let _ = writeln!(
            svg,
            "<rect x=\"{left}\" y=\"{top}\" width=\"{}\" height=\"{}\" fill=\"{colour}\" fill-opacity=\"0.3\" stroke=\"{colour}\"/>",
            cell_width - 2,
            cell_height - 2
        );
        let shown =
            std::iter::once(sign).chain(cell.lines.iter().filter(|_| words).map(String::as_str));
        for (line, words) in shown.enumerate() {
            let _ = writeln!(
                svg,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                left + cell_width / 2,
                top + LINE * (line + 1) + 2,
                escape(words)
            );
        }
    }
    svg + "</svg>\n"
}

/// The same in rows, for who cannot see the picture or wants to copy a number.
fn listed(map: &Map) -> String {
    let name =
        |names: &[String], at: usize| names.get(at).map_or_else(String::new, |name| escape(name));
    let row = |cell: &Cell| {
        format!(
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            name(&map.rows, cell.at.1),
            name(&map.columns, cell.at.0),
            look(cell.ending).2,
            escape(&cell.lines.join(", "))
        )
    };
    format!(
        "<details><summary>The same as a table</summary><div class=\"scroll\"><table><thead><tr><th>{}</th><th>{}</th><th>ends</th><th></th></tr></thead><tbody>{}</tbody></table></div></details>\n",
        escape(&map.y),
        escape(&map.x),
        map.cells.iter().map(row).collect::<String>()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_has_its_place_and_its_sign_and_a_damaged_one_is_no_panic() {
        let cell = |at, ending| Cell { at, ending, lines: vec!["1.2 s".into(), "<5 ms".into()] };
        let map = Map {
            title: "a & b".into(),
            caption: String::new(),
            x: "Gb/s".into(),
            columns: vec!["1".into(), "10".into()],
            y: "MB/s".into(),
            rows: vec!["20".into()],
            cells: vec![
                cell((0, 0), CellEnding::Forced),
                cell((1, 0), CellEnding::Converged),
                cell((7, 7), CellEnding::Failed),
            ],
        };
        let html = one(&map);
        assert_eq!(html.matches("<svg").count(), 2);
        // Two of three lie within the map, in two pictures.
        assert_eq!(html.matches("<rect").count(), 4);
        assert!(html.contains("&lt;5 ms") && !html.contains("<5 ms"));
        assert!(html.contains("switchover forced") && !html.contains("refused"));
        let empty = Map { columns: Vec::new(), rows: Vec::new(), cells: Vec::new(), ..map };
        assert!(one(&empty).contains("<svg"));
    }
}
