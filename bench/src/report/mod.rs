//! A record as one page that needs nothing else: no script, no font, no picture from anywhere.

mod compared;
mod map;
pub mod plot;
mod sections;

use crate::record::Record;
use anyhow::Result;

/// The page's looks, for desktop and telephone, light and dark, screen and paper.
const STYLE: &str = include_str!("style.css");

/// The page of this record.
pub fn page(record: &Record) -> Result<String> {
    let sections = [
        sections::failures(record),
        map::maps(record),
        sections::tables(record),
        compared::side_by_side(record),
        sections::headlines(record)?,
        compared::ratios(record),
        sections::curves(record)?,
        sections::distributions(record)?,
        sections::slices(record),
        sections::turns(record)?,
        sections::timelines(record)?,
        sections::all_figures(record),
        sections::notes(record),
        sections::circumstances(record),
    ];
    let title = escape(&format!("{}: {}", record.command, record.title));
    let begun = escape(&record.begun());
    let state = if record.interrupted {
        "<p class=\"failed\">Interrupted: what was measured until then is here.</p>"
    } else {
        ""
    };
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<header>\n<h1>{}</h1>\n\
         <p>{}</p>\n<p class=\"quiet\">pageferry-bench {}, begun {begun}, {:.0} s</p>\n{state}</header>\n{}</main>\n</body>\n</html>\n",
        escape(&record.command),
        escape(&record.title),
        escape(&record.command),
        record.elapsed_s,
        sections.concat()
    ))
}

/// Text as it may stand in a page: a record may come from anywhere.
#[must_use]
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Spec;

    #[test]
    fn what_a_record_says_is_text_and_a_failure_is_on_the_page() {
        let mut record = Record::begin("downtime", "<script>alert(1)</script>".into(), &1).unwrap();
        record.sample("tcp", Spec::headline("downtime", "ms"), 0, 1.5);
        record.fail("<b>rdma</b>", 0, "no device");
        let page = page(&record).unwrap();
        assert!(!page.contains("<script") && !page.contains("<b>rdma"));
        assert!(page.contains("&lt;b&gt;rdma&lt;/b&gt;") && page.contains("no device"));
        for outside in ["http://", "https://", "src=", "@import"] {
            assert!(!page.replace("http://www.w3.org/2000/svg", "").contains(outside), "{outside}");
        }
    }
}
