//! The command line, defined once: help, man pages and completions are all made from these types.

pub mod container;
pub mod image;
pub mod run;
pub mod system;
pub mod value;

use std::path::PathBuf;

use clap::{CommandFactory, Parser, Subcommand};

/// Containers with a kernel of their own: each runs in a small virtual machine.
#[derive(Debug, Parser)]
#[command(name = "kapsel", version, subcommand_required = true)]
#[command(arg_required_else_help = true, max_term_width = 100)]
pub struct Cli {
    /// Keep all images, templates and sandboxes below DIR
    ///
    /// Without it, images and templates are in /var/lib/kapsel and running sandboxes in /run/kapsel for root, and
    /// in $XDG_DATA_HOME/kapsel and $XDG_RUNTIME_DIR/kapsel for others.
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "KAPSEL_ROOT",
        hide_env = true,
        display_order = 900
    )]
    pub root: Option<PathBuf>,

    /// Read this configuration instead of those in /etc/kapsel and the user's own
    #[arg(long, global = true, value_name = "FILE", display_order = 901)]
    pub config: Option<PathBuf>,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// All commands, in the order in which help lists them.
#[derive(Debug, Subcommand)]
pub enum Command {
    Run(Box<run::Run>),
    Do(Box<run::Do>),
    Exec(container::Exec),
    Cp(container::Cp),

    Ps(container::Ps),
    Logs(container::Logs),
    Inspect(container::Inspect),
    Stats(container::Stats),
    Attach(container::Attach),
    /// Wait until containers end, and print their exit codes
    Wait(container::Names),
    Stop(container::Stop),
    Kill(container::Kill),
    /// Halt the processes of containers
    Pause(container::Names),
    /// Let paused containers go on
    #[command(alias = "unpause")]
    Resume(container::Names),
    Rm(container::Rm),

    Pull(image::Pull),
    Images(image::Images),
    Import(image::Import),
    Rmi(image::Rmi),

    #[command(subcommand)]
    Template(system::Template),
    Prune(system::Prune),
    Doctor(system::Doctor),
    Config(system::Config),
    Install(system::Install),
    Version(system::Version),

    #[command(hide = true)]
    Man(system::Man),
    #[command(hide = true)]
    Completions(system::Completions),
}

/// The headings under which help lists the commands. A command that is in none of them is hidden.
const GROUPS: [(&str, &[&str]); 4] = [
    ("Run", &["run", "do", "exec", "cp"]),
    (
        "Containers",
        &["ps", "logs", "inspect", "stats", "attach", "wait", "stop", "kill", "pause", "resume", "rm"],
    ),
    ("Images", &["pull", "images", "import", "rmi"]),
    ("Host", &["template", "prune", "doctor", "config", "install", "version"]),
];

impl Cli {
    /// The definition, with the commands grouped in its help.
    pub fn definition() -> clap::Command {
        let command = Self::command();
        let heading = *command.get_styles().get_header();
        let literal = *command.get_styles().get_literal();
        let mut list = String::new();
        for (group, names) in GROUPS {
            list += &format!("{heading}{group}:{heading:#}\n");
            for name in names {
                let about = command.find_subcommand(name).and_then(clap::Command::get_about);
                let about = about.map(ToString::to_string).unwrap_or_default();
                list += &format!("  {literal}{name:<10}{literal:#}{about}\n");
            }
            list.push('\n');
        }
        list += "'kapsel COMMAND --help' says more about a command.";
        command.override_usage("kapsel [OPTIONS] COMMAND ...").help_template(format!(
            "{{about}}\n\n{{usage-heading}} {{usage}}\n\n{list}\n\n{heading}Options:{heading:#}\n{{options}}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::definition().debug_assert();
    }

    #[test]
    fn every_command_is_in_exactly_one_group_or_hidden() {
        for command in Cli::definition().get_subcommands() {
            let groups = GROUPS.iter().filter(|(_, names)| names.contains(&command.get_name())).count();
            assert_eq!(groups, usize::from(!command.is_hide_set()), "{}", command.get_name());
        }
    }

    /// After the image (or container) everything belongs to the container, also what looks like a flag of ours.
    #[test]
    fn the_command_keeps_its_flags() {
        let cli = Cli::try_parse_from(["kapsel", "run", "-it", "--rm", "busybox", "--rm", "-e", "--", "-x"])
            .unwrap();
        let Command::Run(run) = cli.command else { panic!("not run") };
        assert_eq!(run.target, ["busybox", "--rm", "-e", "--", "-x"]);
        assert!(run.interactive && run.terminal && run.remove);
    }
}
