//! The rows that are printed.

use anyhow::Result;

/// One run of a method.
pub struct Sample {
    pub ms: f64,
    /// The time in units of the product's.
    pub x_mm: Option<f64>,
    pub peak: usize,
    pub gradients: usize,
    pub kept: Option<f64>,
    pub loss: Option<f32>,
}

/// Prints the rows.
pub struct Table {
    json: bool,
}

impl Table {
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    pub fn start(&mut self, description: &str) -> Result<()> {
        if self.json {
            eprintln!("{description}");
            return Ok(());
        }
        println!("{description}");
        println!(
            "{:18}{:12}{:>11}{:>11}{:>15}{:>8}{:>8}{:>10}{:>8}  test_data",
            "method",
            "kind",
            "runtime_ms",
            "op_mem_mb",
            "over_grads_mb",
            "x_mm",
            "kept",
            "loss",
            "budget"
        );
        Ok(())
    }

    pub fn row(
        &mut self,
        method: &str,
        kind: &str,
        data: &str,
        workspace: Option<usize>,
        sample: &Sample,
    ) {
        let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
        let peak = mib(sample.peak);
        let over_gradients = mib(sample.peak.saturating_sub(sample.gradients));
        if self.json {
            println!(
                "{}",
                serde_json::json!({
                    "method": method, "kind": kind, "runtime_ms": sample.ms, "op_mem_mb": peak,
                    "over_grads_mb": over_gradients, "x_mm": sample.x_mm, "kept": sample.kept,
                    "loss": sample.loss, "test_data": data, "workspace_mb": workspace,
                })
            );
            return;
        }
        let or_dash = |value: Option<f64>, digits: usize| match value {
            Some(value) => format!("{value:.digits$}"),
            None => "-".to_string(),
        };
        println!(
            "{method:18}{kind:12}{:>11.2}{peak:>11.1}{over_gradients:>15.1}{:>8}{:>8}{:>10}{:>8}  {data}",
            sample.ms,
            or_dash(sample.x_mm, 3),
            or_dash(sample.kept, 3),
            or_dash(sample.loss.map(f64::from), 4),
            or_dash(workspace.map(|mib| mib as f64), 0),
        );
    }

    pub fn error(&mut self, method: &str, data: &str, error: &anyhow::Error) {
        match self.json {
            true => println!(
                "{}",
                serde_json::json!({"method": method, "test_data": data, "error": format!("{error:#}")})
            ),
            false => println!("{method:18}{error:#}"),
        }
    }
}
