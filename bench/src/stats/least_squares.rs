//! Straight lines through measured points: what of a cost is fixed, and what grows with which
//! amount.

/// Of the points, so many of a hundred are left out that lie furthest off the first line: on a
/// shared host some always do.
const OUTLIERS_PERCENT: usize = 20;

/// The `N` coefficients, none below zero, with which the rows' sums come closest to their values: a
/// cost that seems to shrink with its amount is noise, and is taken for nothing. All zero without
/// rows.
#[must_use]
pub fn costs<const N: usize>(rows: &[([f64; N], f64)]) -> [f64; N] {
    let first = not_negative(rows);
    let off = |row: &([f64; N], f64)| (sum(&first, &row.0) - row.1).abs();
    let mut kept = rows.to_vec();
    kept.sort_by(|a, b| off(a).total_cmp(&off(b)));
    kept.truncate((rows.len() - rows.len() * OUTLIERS_PERCENT / 100).max(N.min(rows.len())));
    not_negative(&kept)
}

fn sum<const N: usize>(coefficients: &[f64; N], amounts: &[f64; N]) -> f64 {
    coefficients.iter().zip(amounts).map(|(c, a)| c * a).sum()
}

fn not_negative<const N: usize>(rows: &[([f64; N], f64)]) -> [f64; N] {
    let mut used = [true; N];
    loop {
        let solved = solve(rows, &used);
        match (0..N).filter(|n| used[*n]).min_by(|a, b| solved[*a].total_cmp(&solved[*b])) {
            Some(worst) if solved[worst] < 0.0 => used[worst] = false,
            _ => return solved,
        }
    }
}

/// The normal equations by Gaussian elimination, amounts scaled to one so that pages and constants
/// can be compared.
fn solve<const N: usize>(rows: &[([f64; N], f64)], used: &[bool; N]) -> [f64; N] {
    let scale: [f64; N] = std::array::from_fn(|n| {
        let largest = rows.iter().map(|row| row.0[n].abs()).fold(0.0, f64::max);
        if largest > 0.0 { largest } else { 1.0 }
    });
    let mut matrix = [[0.0; N]; N];
    let mut right = [0.0; N];
    for (amounts, value) in rows {
        for n in (0..N).filter(|n| used[*n]) {
            let amount = amounts[n] / scale[n];
            right[n] += amount * value;
            for m in (0..N).filter(|m| used[*m]) {
                matrix[n][m] += amount * amounts[m] / scale[m];
            }
        }
    }
    let mut solved = [0.0; N];
    let mut order = Vec::new();
    for n in 0..N {
        let pivot = (0..N)
            .filter(|r| !order.iter().any(|(row, _)| row == r))
            .max_by(|a, b| matrix[*a][n].abs().total_cmp(&matrix[*b][n].abs()));
        // A column of which nothing is left says nothing that the others did not say.
        let Some(pivot) = pivot.filter(|p| matrix[*p][n].abs() > 1e-9 * rows.len() as f64) else {
            continue;
        };
        order.push((pivot, n));
        for r in (0..N).filter(|r| *r != pivot) {
            let factor = matrix[r][n] / matrix[pivot][n];
            let taken = matrix[pivot];
            matrix[r].iter_mut().zip(taken).for_each(|(cell, taken)| *cell -= factor * taken);
            right[r] -= factor * right[pivot];
        }
    }
    for (row, n) in order {
        solved[n] = right[row] / matrix[row][n] / scale[n];
    }
    solved
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_and_outliers_do_not_move_it() {
        let mut rows: Vec<([f64; 3], f64)> = (0..30)
            .map(|n| (f64::from(n), f64::from(n * 7 % 11)))
            .map(|(a, b)| ([1.0, a * 1000.0, b], 50.0 + 0.002 * a * 1000.0 + 3.0 * b))
            .collect();
        rows[3].1 += 10_000.0;
        rows[20].1 += 5_000.0;
        let [fixed, each, other] = costs(&rows);
        assert!(
            (fixed - 50.0).abs() < 1e-6
                && (each - 0.002).abs() < 1e-9
                && (other - 3.0).abs() < 1e-6
        );
    }

    #[test]
    fn a_cost_is_never_below_nothing_and_too_few_points_are_no_panic() {
        let falling: Vec<([f64; 2], f64)> =
            (1..9).map(|n| ([1.0, f64::from(n)], 10.0 - f64::from(n))).collect();
        let [fixed, each] = costs(&falling);
        assert!(fixed > 0.0 && each == 0.0);
        assert_eq!(costs::<2>(&[]), [0.0, 0.0]);
        let one = costs(&[([1.0, 5.0], 10.0)]);
        assert!((one[0] + 5.0 * one[1] - 10.0).abs() < 1e-9, "{one:?}");
    }
}
